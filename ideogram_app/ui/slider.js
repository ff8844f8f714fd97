// Behaviour of slider.py's markup. `element` outlives its contents, so events are caught there and read from the page.
const stage = () => element.querySelector(".stage");

function place() {
  const range = element.querySelector("input[type=range]");
  if (!range) return;
  const [left, right] = ["left", "right"].map((side) => element.querySelector(`.tag.${side}`).textContent);
  stage().style.setProperty("--split", `${range.value}%`);
  range.setAttribute("aria-valuetext", `${range.value} % ${left}, ${100 - range.value} % ${right}`);
}

function choose(select) {
  const side = select.dataset.side;
  const image = element.querySelector(`img.${side}`);
  const title = select.selectedOptions[0].textContent;
  image.src = select.value;
  image.alt = title;
  element.querySelector(`.tag.${side}`).textContent = title;
  place();
}

function zoom(value) {
  const pixels = value === "fit" ? "" : `${Number(stage().dataset.width) * Number(value)}px`;
  stage().style.width = pixels;
  stage().classList.toggle("fixed", pixels !== "");
}

function restore() {
  if (!stage()) return;
  element.querySelectorAll("select[data-side]").forEach(choose);
  element.querySelectorAll("select[data-tool]").forEach(apply);
  place();
}

function apply(select) {
  if (select.dataset.tool === "zoom") zoom(select.value);
  else stage().classList.toggle("difference", select.value === "difference");
}

element.addEventListener("input", (event) => {
  if (event.target.type === "range") place();
});
element.addEventListener("change", (event) => {
  if (event.target.dataset.side) choose(event.target);
  else if (event.target.dataset.tool) apply(event.target);
});
watch("value", restore);
restore();
