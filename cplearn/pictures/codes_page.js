
"use strict";
const search = document.getElementById("search");
const order = document.getElementById("order");
const found = document.getElementById("found");
const list = document.getElementById("codes");
const cards = list ? [...list.querySelectorAll(".code")] : [];
const dialog = document.getElementById("detail");
const part = (name) => document.getElementById("detail-" + name);

// --- search: a number is a code; other words are in a class or a file name ------------------------------
function setHits(card, words) {
  let any = false;
  for (const item of card.querySelectorAll("li")) {
    const text = item.firstElementChild.dataset.text;
    const hit = words.length > 0 && words.every((word) => text.includes(word));
    item.classList.toggle("hit", hit);
    any = any || hit;
  }
  return any;
}

function filter() {
  const query = search.value.trim().toLowerCase();
  const words = query.split(/\s+/).filter(Boolean);
  const number = /^(?:code\s*|#)?(\d+)$/.exec(query);
  const exact = number && cards.some((card) => Number(card.dataset.code) === Number(number[1]));
  let shown = 0;
  for (const card of cards) {
    const hits = setHits(card, exact ? [] : words);
    const named = words.length > 0 && words.every((word) => card.dataset.classes.includes(word));
    const show = exact ? Number(card.dataset.code) === Number(number[1]) : !words.length || hits || named;
    card.hidden = !show;
    shown += show;
  }
  found.textContent = words.length ? shown + " of " + cards.length + " codes" : cards.length + " codes";
  document.getElementById("nothing").hidden = shown > 0;
}

function sort() {
  const key = order.value;
  const value = (card) => Number(card.dataset[key]);
  const sorted = [...cards].sort((a, b) => (key === "code" ? value(a) - value(b) : value(b) - value(a)));
  list.append(...sorted);
}

// --- between codes ------------------------------------------------------------------------------------------
function goTo(card) {
  if (!card) return;
  card.hidden = false;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "start" });
}

function move(step) {
  const visible = [...document.querySelectorAll(".code:not([hidden])")];
  if (!visible.length) return;
  const here = visible.indexOf(document.activeElement.closest(".code"));
  goTo(visible[here < 0 ? 0 : Math.min(visible.length - 1, Math.max(0, here + step))]);
}

// --- one image ------------------------------------------------------------------------------------------
let opened = null;
let goal = null; // where to go when the dialog is closed; else back to the image

function show(button) {
  opened = button;
  const image = button.querySelector("img");
  part("image").src = image.src;
  part("image").alt = image.alt;
  part("name").textContent = button.dataset.name;
  const facts = JSON.parse(button.dataset.facts);
  part("facts").replaceChildren(...facts.flatMap(([name, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    [dt.textContent, dd.textContent] = [name, value];
    return [dt, dd];
  }));
  part("code").hidden = !document.getElementById("code-" + button.dataset.code);
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const buttons = [...opened.closest(".images").querySelectorAll("button")];
  show(buttons[(buttons.indexOf(opened) + by + buttons.length) % buttons.length]);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".images button");
  if (button) show(button);
  const link = event.target.closest(".near a");
  if (link) {
    event.preventDefault();
    goTo(document.getElementById(link.hash.slice(1)));
  }
});
part("previous").addEventListener("click", () => step(-1));
part("next").addEventListener("click", () => step(1));
part("close").addEventListener("click", () => dialog.close());
part("code").addEventListener("click", () => {
  goal = document.getElementById("code-" + opened.dataset.code);
  dialog.close();
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => {
  if (goal) goTo(goal);
  else opened.focus({ preventScroll: true });
  goal = null;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (dialog.open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    return;
  }
  if (!search) return;
  if (event.target === search) {
    if (event.key === "Enter") goTo(document.querySelector(".code:not([hidden])"));
    if (event.key === "Escape") { search.value = ""; filter(); search.blur(); }
    return;
  }
  if (event.target.tagName === "SELECT") return;
  if (event.key === "/") { event.preventDefault(); search.focus(); search.select(); }
  if (event.key === "j" || event.key === "ArrowRight") { event.preventDefault(); move(1); }
  if (event.key === "k" || event.key === "ArrowLeft") { event.preventDefault(); move(-1); }
  if (event.key === "Escape" && search.value) { search.value = ""; filter(); }
});
if (search) {
  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
  filter();
}
