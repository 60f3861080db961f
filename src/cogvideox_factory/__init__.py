"""CogVideoX Factory: fine-tune the CogVideoX family of video diffusion models on your own clips.

A clip becomes latents once; a batch of latents becomes a loss. The map, in the order in which a clip travels:

    config.py           every option, declared once
    command_line.py     flags and YAML → options
    data/clips.py       lists of videos and captions → Clip
    data/video.py       decode at given times, scaled and cut; write mp4
    data/buckets.py     which clip goes to which size
    data/excerpts.py    what of a clip training sees
    data/decoding.py    decode ahead, in processes of their own
    data/files.py       files that are complete or absent
    data/manifest.py    a folder's files with their hashes, by which damage is found
    data/store.py       the prepared set on disk
    data/split.py       which clips are held out of the training
    data/sampler.py     the order in which clips are drawn
    data/loader.py      prepared clips → Batch
    model/device.py     the device that works
    model/family.py     what a checkpoint is, read from its own config files
    model/encoders.py   text → embeddings, pixels → raw latents
    model/published.py  the configs of the five published models
    model/denoiser.py   one forward pass for the whole family
    model/full.py       full fine-tuning: which weights are trained
    model/pipeline_folder.py   a fine-tuned model as a whole pipeline on disk
    model/adapters.py   LoRA or the model's own weights: attach, save, load
    memory/strategies.py    the ways to train with less memory, one table
    memory/copies.py    copies between host and GPU beside the computation
    memory/activations.py   inputs of blocks, kept on the host
    memory/block_swap.py    frozen weights of blocks, kept on the host
    memory/feed_forward.py  the feed-forward in chunks
    memory/split_checkpoints.py   checkpoints of half a block
    memory/lora_precision.py   a LoRA that computes in 16 bits
    memory/quantized_base.py   frozen weights in 8 or 4 bits
    resolve.py          what the checkpoint decides where the user did not
    prepare.py          data + encoders → prepared set
    inspection.py       a data set as training would see it, with its problems
    sampling.py         videos from a pipeline in memory
    training/           objective, held-out loss, optimizers, checkpoint, metrics, and the loop that one reads
                        top-down
    memory/tracker.py   counts the bytes that live, by what they are for
    planning/           each phase of a run traced on fake tensors: its peak memory
    report/             run folder → report.html; several → a page that compares them
    run_folder.py       where a run keeps its checkpoints and videos
    messages.py         what is said, as text or as JSON lines
    progress.py         progress bars, or lines of progress
    stopping.py         Ctrl-C, SIGTERM and SIGUSR1 as a request to finish the step and save
    ranks.py            what several processes do together: wait, stop, fail
    demo/               a tiny model and rendered clips
    cli.py              the commands

Modules import only from those above them in the chain
config ← data, model ← memory ← prepare, sampling ← training ← report ← cli; data and model do not know each other.
"""

__version__ = "0.1.0"
