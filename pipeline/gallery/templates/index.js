// The list of all tracks and the map.

const byId = (id) => document.getElementById(id);
const audio = byId("audio");
const body = document.querySelector("#tracks tbody");
const heads = [...document.querySelectorAll("#tracks th[data-by]")];
let sorting = { by: "made_at", isDescending: true };
let playing = null; // the URL of what plays

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- playing ---------------------------------------------------------------------------------------

function toggle(url, volume = 1) {
  if (playing === url) {
    playing = null;
    audio.pause();
  } else {
    playing = url;
    audio.src = url;
    audio.volume = volume;
    audio.play().catch((error) => {
      if (error.name !== "AbortError") stopped();
    });
  }
  showPlaying();
}

function stopped() {
  playing = null;
  byId("playing").textContent = "";
  showPlaying();
}

function showPlaying() {
  for (const button of body.querySelectorAll("button[data-url]")) {
    const isPlaying = button.dataset.url === playing;
    button.textContent = isPlaying ? "Stop" : "Play";
    button.setAttribute("aria-pressed", String(isPlaying));
  }
  for (const circle of document.querySelectorAll("#map circle")) circle.classList.toggle("playing", circle.dataset.url === playing);
}

audio.addEventListener("ended", stopped);

// -- the table -------------------------------------------------------------------------------------

function compare(one, other) {
  const [a, b] = [one[sorting.by], other[sorting.by]];
  if (a === b) return 0;
  if (a === null || b === null) return a === null ? 1 : -1; // what is not known comes last
  const order = typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" }) : a - b;
  return sorting.isDescending ? -order : order;
}

function row(track) {
  const play = element("td");
  if (track.best) {
    const button = element("button", { onclick: () => toggle(track.best), textContent: "Play" });
    button.dataset.url = track.best;
    button.setAttribute("aria-label", `Play ${track.name}`);
    play.append(button);
  }
  const name = element("td", {}, track.page ? element("a", { href: track.page, textContent: track.name }) : track.name);
  if (track.error) name.append(element("div", { className: "error", textContent: `${track.state}: ${track.error}` }));
  const cell = (text, className = "") => element("td", { className, textContent: text ?? "" });
  return element(
    "tr", {}, play, name,
    cell(track.made_at && new Date(track.made_at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })),
    cell(track.score === null ? "" : track.score.toFixed(2), "number"),
    cell(track.tempo_bpm && Math.round(track.tempo_bpm), "number optional"),
    cell(track.key, "optional"), cell(track.engine, "optional"), cell(track.takes || "", "number optional"),
  );
}

// A letter with an accent may be one character or two, as in names of files from a Mac.
const folded = (text) => text.normalize().toLowerCase();

function showTable() {
  const words = folded(byId("search").value).split(/\s+/).filter(Boolean);
  const isShown = (track) =>
    words.every((word) => folded(track.name).includes(word)) &&
    (byId("state").value === "" || track.state === byId("state").value) &&
    (byId("engine").value === "" || track.engine === byId("engine").value);
  const shown = tracks.rows.filter(isShown).sort(compare);
  body.replaceChildren(...shown.map(row));
  for (const head of heads) {
    const direction = sorting.isDescending ? "descending" : "ascending";
    head.setAttribute("aria-sort", head.dataset.by === sorting.by ? direction : "none");
  }
  byId("count").value = `${shown.length} of ${tracks.rows.length} tracks`;
  showPlaying();
}

for (const head of heads) {
  head.querySelector("button").addEventListener("click", () => {
    const isSame = sorting.by === head.dataset.by;
    const startsHigh = ["made_at", "score", "takes"].includes(head.dataset.by);
    sorting = { by: head.dataset.by, isDescending: isSame ? !sorting.isDescending : startsHigh };
    showTable();
  });
}
for (const id of ["state", "engine"]) {
  const values = [...new Set(tracks.rows.map((track) => track[id]).filter(Boolean))].sort();
  byId(id).append(...values.map((value) => element("option", { value, textContent: value })));
  byId(id).addEventListener("change", showTable);
}
byId("search").addEventListener("input", showTable);
byId("download").addEventListener("click", Ratings.download);
if (tracks.older) {
  byId("older").hidden = false;
  byId("older").textContent = `${tracks.older} older tracks are not listed.`;
}

// -- the map ---------------------------------------------------------------------------------------

function drawMap() {
  const svg = byId("map");
  byId("map-section").hidden = tracks.points.length === 0;
  for (const [x, y, name, url, isSource] of tracks.points) {
    const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    for (const [key, value] of Object.entries({ cx: x, cy: y, r: isSource ? 1.6 : 1.1 })) circle.setAttribute(key, value);
    circle.classList.toggle("is-source", isSource);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = name;
    circle.append(title);
    if (url) {
      circle.dataset.url = url;
      circle.addEventListener("click", () => {
        toggle(url);
        byId("playing").textContent = playing ? `Playing ${name}` : "";
      });
    }
    svg.append(circle);
  }
}

drawMap();
showTable();
