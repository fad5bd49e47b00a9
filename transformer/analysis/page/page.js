"use strict";
// Shared by the pages: data, elements, and choices by pointer or arrow keys.
const Page = (() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const el = (id) => document.getElementById(id);
  function make(tag, text = "", more = {}) {
    const node = document.createElement(tag);
    node.textContent = text;
    Object.entries(more).forEach(([name, value]) => node.setAttribute(name, value));
    return node;
  }
  function svg(tag, more, text = "") {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(more).forEach(([name, value]) => node.setAttribute(name, value));
    if (text) node.textContent = text;
    return node;
  }
  function choices(id, names, chosen, change) {
    const box = el(id);
    box.replaceChildren(...(names.length > 1 ? names : []).map((name, index) => {
      const button = make("button", name, { type: "button", role: "radio", "aria-checked": index === chosen });
      button.tabIndex = index === chosen ? 0 : -1;
      button.addEventListener("click", () => change(index));
      return button;
    }));
  }
  function step(event, moves) {
    const by = moves[event.key];
    if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return undefined;
    event.preventDefault();
    return by;
  }
  for (const box of document.querySelectorAll(".choice")) {
    box.addEventListener("keydown", (event) => {
      const by = step(event, { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 });
      if (!by) return;
      const buttons = [...box.querySelectorAll("button")], now = buttons.findIndex((b) => b.tabIndex === 0);
      const next = (now + by + buttons.length) % buttons.length;
      buttons[next].click();
      requestAnimationFrame(() => box.querySelectorAll("button")[next].focus());
    });
  }
  return { page, el, make, svg, choices, step };
})();
