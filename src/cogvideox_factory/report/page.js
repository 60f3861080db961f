// Each sample is one player: its first video leads, the others follow, and one button and one slider hold them all.

const APART = 0.06; // seconds by which two videos of a sample may differ
const everyVideo = document.getElementById("play");

function makePlayer(sample) {
  const strip = sample.querySelector(".strip"), pair = sample.querySelectorAll(".pair figure");
  if (strip) {
    strip.prepend(pair[0].cloneNode(true));
    strip.append(pair[1].cloneNode(true));
  }
  const videos = [...sample.querySelectorAll("video")], controls = sample.querySelector(".controls");
  if (!videos.length) return null;
  const [leader, ...others] = videos, [button, slider] = controls.children;
  const player = {
    isPlaying: () => !leader.paused,
    play: on => videos.forEach(video => on ? video.play().catch(() => {}) : video.pause()),
  };
  const showState = () => {
    button.textContent = player.isPlaying() ? "Pause" : "Play";
    showAll();
  };
  const showPlace = () => {
    if (leader.duration) slider.value = 1000 * leader.currentTime / leader.duration;
    if (player.isPlaying()) requestAnimationFrame(showPlace);
  };
  leader.addEventListener("timeupdate", () => {
    if (leader.paused) return;
    for (const other of others) {
      // Videos of other lengths, of runs with other numbers of frames, go their own way.
      if (!(Math.abs(other.duration - leader.duration) < APART)) continue;
      const gap = Math.abs(other.currentTime - leader.currentTime);
      if (Math.min(gap, other.duration - gap) > APART) other.currentTime = leader.currentTime;
    }
  });
  for (const event of ["play", "pause"]) leader.addEventListener(event, showState);
  leader.addEventListener("play", showPlace);
  button.addEventListener("click", () => player.play(!player.isPlaying()));
  slider.addEventListener("input", () => {
    player.play(false);
    // Not quite to the end, from where a browser would go back to the start.
    for (const video of videos) if (video.duration) video.currentTime = 0.999 * video.duration * slider.value / 1000;
  });
  controls.hidden = false;
  showPlace();
  return { ...player, showState };
}

const anyPlays = () => players.some(player => player.isPlaying());
const showAll = () => { if (everyVideo) everyVideo.textContent = anyPlays() ? "Pause all" : "Play all"; };
const players = [];
for (const sample of document.querySelectorAll(".sample")) {
  const player = makePlayer(sample);
  if (player) players.push(player);
}
if (everyVideo) {
  everyVideo.hidden = false;
  everyVideo.addEventListener("click", () => {
    const on = !anyPlays();
    players.forEach(player => player.play(on));
  });
}
if (matchMedia("(prefers-reduced-motion: reduce)").matches) players.forEach(player => player.play(false));
players.forEach(player => player.showState());
