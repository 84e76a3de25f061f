"use strict";

// Previews: one step for all prompts; the films hold the pictures, the views show them large.

const control = document.querySelector(".control");
const steps = control ? control.dataset.steps.split(" ").map(Number) : [];
const strips = [...document.querySelectorAll(".strip")].map(makeStrip);

function makeStrip(strip) {
  const frames = [...strip.querySelectorAll(".film button")];
  const view = strip.querySelector(".view");
  const divider = view.querySelector(".divider");
  strip.classList.add("live");
  view.hidden = false;
  view.querySelector(".before").src = frames[0].querySelector("img").src;
  if (divider) {
    divider.addEventListener("input", () => view.style.setProperty("--cut", `${divider.value}%`));
  }
  for (const frame of frames) {
    frame.addEventListener("click", () => showStep(steps.indexOf(Number(frame.dataset.step))));
  }
  return { frames, view, divider };
}

// A run that drew nothing at this very step shows the last before it.
function show({ frames, view, divider }, step) {
  const reached = frames.filter((frame) => Number(frame.dataset.step) <= step);
  const frame = reached.length ? reached[reached.length - 1] : frames[0];
  const picture = frame.querySelector("img");
  const after = view.querySelector(".after");
  after.src = picture.src;
  after.alt = picture.alt;
  view.classList.toggle("single", !divider || frame === frames[0]);
  view.querySelector(".tag.right").textContent = Number(frame.dataset.step) ? `step ${frame.dataset.step}` : "without LoRA";
  for (const each of frames) {
    each.toggleAttribute("aria-current", each === frame);
  }
  const film = frame.closest(".film");
  film.scrollLeft = frame.offsetLeft - film.offsetLeft - (film.clientWidth - frame.clientWidth) / 2;
}

let place = steps.length - 1;

function showStep(wanted) {
  place = Math.max(0, Math.min(steps.length - 1, wanted));
  if (control) {
    control.querySelector("input").value = place;
    control.querySelector("input").setAttribute("aria-valuetext", `step ${steps[place]}`);
    control.querySelector("output").textContent = steps[place];
  }
  for (const strip of strips) {
    show(strip, control ? steps[place] : Infinity);
  }
}

if (control) {
  control.hidden = false;
  control.querySelector("input").addEventListener("input", (event) => showStep(Number(event.target.value)));
  const play = control.querySelector(".play");
  let timer = 0;
  const pause = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  };
  const next = () => (place < steps.length - 1 ? showStep(place + 1) : pause());
  play.addEventListener("click", () => {
    if (timer) {
      pause();
      return;
    }
    showStep(place === steps.length - 1 ? 0 : place);
    timer = setInterval(next, 700);
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
  });
  document.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    // Sliders and curves have arrow keys of their own.
    const taken = event.target.closest("input, .plot") || event.altKey || event.ctrlKey || event.metaKey;
    if (move && !taken) {
      event.preventDefault();
      showStep(place + move);
    }
  });
}
if (strips.length) {
  showStep(place);
}

// Curves: a cursor at one step in all panels, and the numbers there.

const panels = [...document.querySelectorAll(".panel")].map((panel) => ({
  plot: panel.querySelector(".plot"),
  cursor: panel.querySelector(".cursor"),
  output: panel.querySelector("output"),
  series: JSON.parse(panel.querySelector("script").textContent),
}));

function nearest(points, step) {
  let best = 0;
  points.forEach((each, index) => {
    if (Math.abs(each - step) < Math.abs(points[best] - step)) {
      best = index;
    }
  });
  return best;
}

function text(series, step) {
  const shown = series[0].steps[nearest(series[0].steps, step)];
  const said = series.map(({ label, steps: at, values, smooth }) => {
    const index = nearest(at, step);
    if (series.length > 1) {
      const where = at[index] === shown ? "" : ` at ${at[index]}`;
      return `${label} ${smooth ? smooth[index] : values[index]}${where}`;
    }
    return smooth ? `${values[index]}, smoothed ${smooth[index]}` : values[index];
  });
  return `step ${shown}: ${said.join(", ")}`;
}

let pointed = null;

function point(step) {
  pointed = step;
  for (const { plot, cursor, output, series } of panels) {
    const first = Number(plot.dataset.first);
    const last = Number(plot.dataset.last);
    cursor.hidden = step === null;
    output.textContent = "";
    if (step !== null) {
      cursor.style.left = `${(100 * (step - first)) / (last - first)}%`;
      output.textContent = text(series, step);
    }
  }
}

for (const { plot } of panels) {
  const first = Number(plot.dataset.first);
  const last = Number(plot.dataset.last);
  const bounded = (step) => Math.round(Math.max(first, Math.min(last, step)));
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    point(bounded(first + ((event.clientX - box.left) / box.width) * (last - first)));
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
  plot.addEventListener("blur", () => point(null));
  plot.addEventListener("keydown", (event) => {
    const stride = Math.max(1, Math.round((last - first) / 100));
    const to = { ArrowLeft: (pointed ?? last) - stride, ArrowRight: (pointed ?? first) + stride, Home: first, End: last };
    if (event.key in to) {
      event.preventDefault();
      point(bounded(to[event.key]));
    }
  });
}
