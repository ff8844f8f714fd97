// Buttons of guide_card.py's markup, and what the card keeps when its contents are replaced: opened lines and the focus.
const opened = {};
let focused = "";

const keyOf = (node) => {
  const stage = node.closest("[data-stage]");
  const part = node.closest("button[data-act]") ? "button" : node.closest("summary") ? "summary" : node.closest("a") ? "a" : "";
  return stage && part ? `[data-stage="${stage.dataset.stage}"] ${part}` : "";
};

function restore() {
  for (const [stage, isOpen] of Object.entries(opened)) {
    const details = element.querySelector(`[data-stage="${stage}"] details`);
    if (details) details.open = isOpen;
  }
  if (focused && document.activeElement === document.body) {
    (element.querySelector(focused) || element.querySelector("[aria-current] button"))?.focus({ preventScroll: true });
  }
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) trigger("click", { act: button.dataset.act, name: button.dataset.name });
  const details = event.target.closest("summary")?.parentElement;
  if (details) opened[details.closest("[data-stage]").dataset.stage] = !details.open;
});
element.addEventListener("focusin", (event) => { focused = keyOf(event.target); });
element.addEventListener("focusout", (event) => { if (event.relatedTarget) focused = ""; });
document.addEventListener("pointerdown", (event) => { if (!element.contains(event.target)) focused = ""; });
watch("value", () => requestAnimationFrame(restore));
