"""`python -m cogvideox_factory`, which `accelerate launch -m cogvideox_factory` needs."""

from cogvideox_factory.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
