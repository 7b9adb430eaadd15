"use strict";
// What both kinds of pages share: the ratings, which are kept in the browser, and the list of tracks.

const PREFIX = "variations.rating.";

// What the browser keeps. One that is told to keep nothing has none or throws: ratings last as long as the page.
let kept = null;
try {
  kept = localStorage;
} catch (error) {}
if (kept === null) {
  kept = {};
  document.getElementById("download").textContent += " (this browser doesn't keep them)";
}

const Ratings = {
  // The rating of a file by its hash; undefined if there is none.
  of(sha256) {
    return kept[PREFIX + sha256] && JSON.parse(kept[PREFIX + sha256]);
  },
  // Keep a rating; one that says nothing is forgotten.
  keep(rating) {
    if (rating.stars === null && rating.kept === null && rating.note === "") delete kept[PREFIX + rating.sha256];
    else kept[PREFIX + rating.sha256] = JSON.stringify(rating);
  },
  all() {
    return Object.keys(kept).filter((key) => key.startsWith(PREFIX)).sort().map((key) => JSON.parse(kept[key]));
  },
  download() {
    const text = JSON.stringify({ schema: 1, ratings: Ratings.all() }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "ratings.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
};

// The rows of tracks.js; a folder that was copied alone has none.
const tracks = typeof TRACKS === "undefined" ? { rows: [], points: [] } : TRACKS;

function clock(seconds) {
  const whole = Math.floor(Math.max(seconds, 0));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

// The volume at which a sound of that loudness is as loud as the quietest one. Louder isn't better.
function matchedVolume(lufs, quietest) {
  return Math.min(1, 10 ** ((quietest - lufs) / 20));
}

// What gets the focus must not be scrolled below the header, where that stays at the top.
const header = document.querySelector("header");
new ResizeObserver(() => {
  const isSticky = getComputedStyle(header).position === "sticky";
  document.documentElement.style.scrollPaddingTop = isSticky ? `${header.offsetHeight}px` : "0";
}).observe(header);
