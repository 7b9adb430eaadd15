// The page of one track: one sound is heard at a time, and all share a position.

const pictures = JSON.parse(document.getElementById("pictures").textContent);
const sounds = [...document.querySelectorAll(".sound")].map((element) => ({
  element,
  audio: element.querySelector("audio"),
  wave: element.querySelector(".wave"),
  sha256: element.dataset.sha256,
  duration: Number(element.dataset.duration),
  lufs: Number(element.dataset.lufs),
  isMissing: false,
}));
const [source, ...takes] = sounds; // the takes by rank
let order = takes; // as they are shown
let current = takes[0] || source;
let isPlaying = false;
let loop = null; // {from, to} in seconds
let stopAt = null; // in seconds, when only a part is played
let switches = 0; // between sounds so far, which tells an earlier one that it is over
let lead = 0.05; // how long a sound takes to start, in seconds, as the last one did
const byId = (id) => document.getElementById(id);
const quietest = Math.min(...sounds.map((sound) => sound.lufs));

// -- playing ---------------------------------------------------------------------------------------

// The loop, unless it begins after the end of a shorter sound.
const loopIn = (sound) => (loop && loop.from < sound.duration - 0.05 ? loop : null);

// Where a sound is entered that is shorter than the position: as if it were repeated.
const within = (sound, seconds) => (seconds < sound.duration ? Math.max(seconds, 0) : seconds % sound.duration);

function pauseAllBut(sound) {
  for (const other of sounds) if (other !== sound) other.audio.pause();
}

const aMoment = () => new Promise((resolve) => setTimeout(resolve, 25));

const volumeOf = (sound) => (byId("match").checked ? matchedVolume(sound.lufs, quietest) : 1);

function setVolumes() {
  for (const sound of sounds) sound.audio.volume = volumeOf(sound);
}

async function play() {
  if (current.isMissing) return;
  isPlaying = true;
  show();
  if (current.audio.currentTime >= current.duration - 0.05) current.audio.currentTime = loopIn(current)?.from ?? 0;
  try {
    await current.audio.play();
  } catch (error) {
    if (error.name !== "AbortError") pause();
  }
}

function pause() {
  isPlaying = false;
  stopAt = null;
  current.audio.pause();
  show();
}

// Another sound at the same position. The one that plays is heard until the other one runs.
async function choose(sound) {
  if (sound === current || sound.isMissing) return;
  const before = sounds.find((one) => !one.audio.paused && one.audio.volume > 0) || current;
  const mine = ++switches;
  current = sound;
  stopAt = null;
  if (sound === before) { // still heard, as another one that was chosen hasn't begun
    pauseAllBut(sound);
    show();
    return;
  }
  if (!isPlaying) {
    sound.audio.currentTime = within(sound, before.audio.currentTime);
    show();
    return;
  }
  show();
  sound.audio.volume = 0; // not muted, as browsers open another output when that ends
  for (let tries = 0, late = 1; Math.abs(late) > 0.02 && tries < 4; tries++) {
    sound.audio.currentTime = within(sound, before.audio.currentTime + lead);
    try {
      await sound.audio.play();
    } catch (error) {
      if (mine !== switches) return; // yet another one was chosen meanwhile
      before.audio.pause();
      if (error.name !== "AbortError") pause();
      return;
    }
    for (let steady = 0; steady < 2 && isPlaying; ) { // until both run
      const earlier = late;
      await aMoment();
      if (mine !== switches) return;
      late = within(sound, before.audio.currentTime) - sound.audio.currentTime;
      steady = Math.abs(late - earlier) < 0.008 ? steady + 1 : 0;
    }
    lead = Math.min(Math.max(lead + late, 0), 1);
  }
  pauseAllBut(sound);
  sound.audio.volume = volumeOf(sound);
  if (!isPlaying) sound.audio.pause();
}

function seek(seconds) {
  stopAt = null;
  current.audio.currentTime = Math.min(Math.max(seconds, 0), Math.max(current.duration - 0.01, 0));
  show();
}

function setLoop(range) {
  loop = range;
  if (range) seek(range.from);
  show();
}

function playAround(sound, seconds) {
  loop = null;
  switches++;
  current = sound;
  pauseAllBut(sound);
  setVolumes();
  seek(seconds - 1);
  stopAt = seconds + 1;
  play();
}

function playNextJoin() {
  const joins = [...current.element.querySelectorAll(".join")].map((button) => Number(button.dataset.at));
  const next = joins.find((at) => at > current.audio.currentTime + 0.01) ?? joins[0];
  if (next !== undefined) playAround(current, next);
}

function watchPosition() {
  const at = current.audio.currentTime;
  const loop = loopIn(current);
  if (isPlaying && stopAt !== null && at >= stopAt) pause();
  if (isPlaying && loop && (at >= Math.min(loop.to, current.duration) || at < loop.from - 0.1)) current.audio.currentTime = loop.from;
  show();
}

for (const sound of sounds) {
  sound.audio.addEventListener("timeupdate", watchPosition);
  sound.audio.addEventListener("ended", () => {
    if (sound !== current) return;
    if (loopIn(sound)) seek(loop.from), play();
    else pause();
  });
}

for (const sound of sounds) {
  const missing = () => {
    sound.isMissing = true;
    sound.element.querySelector(".missing").hidden = false;
  };
  const places = sound.audio.querySelectorAll("source"); // of which none may be known
  if (places.length === 0) missing();
  else places[places.length - 1].addEventListener("error", missing);
}

// -- drawing ---------------------------------------------------------------------------------------

function show() {
  for (const sound of sounds) {
    const at = sound === current ? sound.audio.currentTime : within(sound, current.audio.currentTime);
    sound.element.classList.toggle("current", sound === current);
    sound.wave.querySelector(".head").style.left = `${(100 * at) / sound.duration}%`;
    sound.wave.setAttribute("aria-valuemax", sound.duration.toFixed(1));
    sound.wave.setAttribute("aria-valuenow", at.toFixed(1));
    sound.wave.setAttribute("aria-valuetext", clock(at));
    const region = sound.wave.querySelector(".loop");
    region.hidden = loopIn(sound) === null;
    if (!region.hidden) {
      region.style.left = `${(100 * loop.from) / sound.duration}%`;
      region.style.width = `${(100 * (Math.min(loop.to, sound.duration) - loop.from)) / sound.duration}%`;
    }
  }
  byId("play").textContent = isPlaying ? "Pause" : "Play";
  byId("play").setAttribute("aria-pressed", String(isPlaying));
  byId("unloop").hidden = loop === null;
  byId("now").value = `${clock(current.audio.currentTime)} of ${clock(current.duration)}`;
}

function everyFrame() {
  if (isPlaying) watchPosition();
  requestAnimationFrame(everyFrame);
}

const bytes = (packed) => Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));

function drawPeaks(sound) {
  const picture = pictures[sound.sha256];
  if (!picture) return;
  const canvas = sound.wave.querySelector(".peaks");
  const context = canvas.getContext("2d");
  const style = getComputedStyle(sound.wave);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = style.getPropertyValue("--peaks");
  bytes(picture.peaks).forEach((peak, column) => {
    const height = Math.max(1, (peak / 255) * canvas.height);
    context.fillRect(column, (canvas.height - height) / 2, 1, height);
  });
  context.fillStyle = style.getPropertyValue("--join");
  for (const join of sound.element.querySelectorAll(".join")) {
    context.fillRect((Number(join.dataset.at) / sound.duration) * canvas.width - 1, 0, 2, canvas.height);
  }
}

// Columns of 12 pitch classes; a sound that is shorter than the longest leaves room at the right.
function drawChroma(canvas, sound, longest) {
  const picture = pictures[sound.sha256];
  if (!picture) return;
  const values = bytes(picture.chroma);
  const columns = values.length / 12;
  canvas.width = Math.max(1, Math.round((columns * longest) / sound.duration));
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, 12);
  for (let column = 0; column < columns; column++) {
    for (let pitch = 0; pitch < 12; pitch++) {
      const value = values[12 * column + pitch] / 255;
      const at = 4 * ((11 - pitch) * columns + column);
      image.data.set([30 + 225 * value ** 2, 30 + 180 * value, 80 + 60 * (1 - value), 255], at);
    }
  }
  context.putImageData(image, 0, 0);
}

function drawAll() {
  for (const sound of sounds) drawPeaks(sound);
  for (const take of takes) {
    const longest = Math.max(take.duration, source.duration);
    drawChroma(take.element.querySelector(".chroma"), take, longest);
    drawChroma(take.element.querySelector(".chroma-of-source"), source, longest);
  }
}

// -- ratings ---------------------------------------------------------------------------------------

function checked(take, name) {
  return take.element.querySelector(`.${name} input:checked`);
}

function readRating(take) {
  return {
    track: document.body.dataset.track,
    file: take.element.dataset.file,
    sha256: take.sha256,
    stars: checked(take, "stars") ? Number(checked(take, "stars").value) : null,
    kept: checked(take, "kept") ? checked(take, "kept").value === "true" : null,
    note: take.element.querySelector("[name=note]").value.trim(),
  };
}

function showRating(take) {
  const rating = Ratings.of(take.sha256) || { stars: null, kept: null, note: "" };
  for (const input of take.element.querySelectorAll(".stars input")) input.checked = Number(input.value) === rating.stars;
  for (const input of take.element.querySelectorAll(".kept input")) input.checked = input.value === String(rating.kept);
  take.element.querySelector("[name=note]").value = rating.note;
}

function rate(take, changes) {
  if (take === source) return;
  Ratings.keep({ ...readRating(take), ...changes });
  showRating(take);
}

for (const take of takes) {
  showRating(take);
  take.element.querySelector(".rating").addEventListener("change", () => rate(take, {}));
  take.element.querySelector(".clear").addEventListener("click", () => rate(take, { stars: null, kept: null, note: "" }));
}

// -- blind mode ------------------------------------------------------------------------------------

function shuffled(list) {
  const left = [...list];
  return list.map(() => left.splice(Math.floor(Math.random() * left.length), 1)[0]);
}

function setBlind(isBlind) {
  byId("blind").checked = isBlind;
  document.body.classList.toggle("blind", isBlind);
  order = isBlind ? shuffled(takes) : takes;
  order.forEach((take, place) => {
    byId("takes").append(take.element);
    take.element.querySelector(".number").textContent = place + 1;
    take.element.setAttribute("aria-label", `Take ${place + 1}`);
    take.wave.setAttribute("aria-label", `Position in take ${place + 1}`);
  });
  for (const details of document.querySelectorAll("#takes details")) details.open = false;
}

// -- what the user does ----------------------------------------------------------------------------

for (const sound of sounds) {
  sound.element.querySelector(".choose").addEventListener("click", () => (sound === current ? (isPlaying ? pause() : play()) : choose(sound)));
  for (const button of sound.element.querySelectorAll(".join")) {
    button.addEventListener("click", () => playAround(sound, Number(button.dataset.at)));
  }
  const secondsAt = (event) => {
    const box = sound.wave.getBoundingClientRect();
    return (Math.min(Math.max(event.clientX - box.left, 0), box.width) / box.width) * sound.duration;
  };
  let from = null;
  sound.wave.addEventListener("pointerdown", (event) => {
    from = { x: event.clientX, seconds: secondsAt(event) };
    sound.wave.setPointerCapture(event.pointerId);
  });
  sound.wave.addEventListener("pointerup", async (event) => {
    if (from === null) return;
    const [start, to] = [from, secondsAt(event)];
    from = null;
    await choose(sound);
    if (Math.abs(event.clientX - start.x) > 4) setLoop({ from: Math.min(start.seconds, to), to: Math.max(start.seconds, to) });
    else seek(to);
  });
  sound.wave.addEventListener("pointercancel", () => (from = null));
}

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Selected: copy it";
    }
  });
}

byId("play").addEventListener("click", () => (isPlaying ? pause() : play()));
byId("unloop").addEventListener("click", () => setLoop(null));
byId("match").addEventListener("change", setVolumes);
byId("blind").addEventListener("change", () => setBlind(byId("blind").checked));
byId("download").addEventListener("click", Ratings.download);

function step(places) {
  const shown = [source, ...order];
  choose(shown[Math.min(Math.max(shown.indexOf(current) + places, 0), shown.length - 1)]);
  current.element.scrollIntoView({ block: "nearest" });
}

const KEYS = {
  ArrowLeft: (event) => seek(current.audio.currentTime - (event.shiftKey ? 10 : 2)),
  ArrowRight: (event) => seek(current.audio.currentTime + (event.shiftKey ? 10 : 2)),
  ArrowUp: () => step(-1),
  ArrowDown: () => step(1),
  " ": () => (isPlaying ? pause() : play()),
  Escape: () => setLoop(null),
  "[": () => byId("previous").click(),
  "]": () => byId("next").click(),
  j: playNextJoin,
  k: () => rate(current, { kept: true }),
  x: () => rate(current, { kept: false }),
  b: () => setBlind(!byId("blind").checked),
};

document.addEventListener("keydown", (event) => {
  const isBracket = "[]".includes(event.key); // which many keyboards have with alt
  if (event.metaKey || ((event.ctrlKey || event.altKey) && !isBracket)) return;
  const focused = event.target.closest("input, button, summary, a");
  if (focused && focused.matches("[type=text]")) return;
  if (focused && (event.key === " " || (focused.matches("[type=radio]") && event.key.startsWith("Arrow")))) return;
  const digit = /^Digit([0-9])$/.exec(event.code);
  if (digit && event.shiftKey) {
    if (digit[1] >= 1 && digit[1] <= 5) rate(current, { stars: Number(digit[1]) });
  } else if (digit || /^Numpad[0-9]$/.test(event.code)) {
    const n = Number(event.code.slice(-1));
    const sound = n === 0 ? source : order[n - 1];
    if (sound) choose(sound), sound.element.scrollIntoView({ block: "nearest" });
  } else if (KEYS[event.key]) KEYS[event.key](event);
  else return;
  event.preventDefault();
});

// -- the tracks before and after -------------------------------------------------------------------

const pages = tracks.rows.filter((row) => row.page);
const place = pages.findIndex((row) => row.sha256 === document.body.dataset.track);
for (const [id, row] of [["previous", pages[place - 1]], ["next", place < 0 ? undefined : pages[place + 1]]]) {
  if (row) {
    byId(id).href = document.body.dataset.top + row.page;
    byId(id).hidden = false;
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
setVolumes();
drawAll();
show();
requestAnimationFrame(everyFrame);
