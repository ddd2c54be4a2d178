// The Pareto front: recipes of marks, and the line that asks who wins within another latency.

const STEPS = 1000;

const shown = (ms) => new Intl.NumberFormat("en", { maximumSignificantDigits: 3 }).format(ms);

/** Returns what to give the next call after the front was drawn anew: where the line stands. */
export function setUpFront(main, kept) {
  const plot = main.querySelector(".plot");
  if (!plot || plot.dataset.ready) return kept;
  plot.dataset.ready = "1";
  const marks = [...plot.querySelectorAll(".mark")].sort((a, b) => a.dataset.order - b.dataset.order);
  showRecipes(plot, marks);
  return standLine(plot, marks, kept);
}

function standLine(plot, marks, kept) {
  const [low, high, limit] = ["low", "high", "limit"].map((name) => Number(plot.dataset[name]));
  const slider = plot.querySelector("#slo-line");
  const reset = plot.parentElement.querySelector("#slo-reset");
  const answer = plot.parentElement.querySelector("#slo-answer");
  const lines = plot.querySelectorAll("#slo-handle line");
  const share = (ms) => (plot.dataset.log ? Math.log(ms / low) / Math.log(high / low) : (ms - low) / (high - low));
  const at = (part) => (plot.dataset.log ? low * (high / low) ** part : low + (high - low) * part);
  const now = { ms: kept.ms ?? limit };

  function move(ms) {
    now.ms = ms;
    const place = `${Math.min(1, Math.max(0, share(ms))) * 100}%`;
    for (const line of lines) for (const end of ["x1", "x2"]) line.setAttribute(end, place);
    plot.querySelector(".allowed").setAttribute("width", place);
    const best = winner(marks, ms);
    for (const mark of marks) {
      mark.classList.toggle("wins", mark === best);
      mark.classList.toggle("late", mark.dataset.latency === "" || Number(mark.dataset.latency) > ms);
    }
    tell(best, ms);
  }

  function tell(best, ms) {
    const within = `${plot.dataset.quantile} within ${shown(ms)} ms`;
    const name = document.createElement("b");
    name.textContent = best ? best.dataset.label : "no variant";
    const what = best ? ` wins: ${best.dataset.told}.` : " keeps it.";
    const more = best && best.dataset.id === plot.dataset.best ? " It is the study's best." : "";
    answer.replaceChildren(`${within}: `, name, what + more);
    slider.setAttribute("aria-valuetext", `${within}: ${name.textContent}${best ? " wins" : " keeps it"}`);
    reset.hidden = ms === limit;
  }

  slider.addEventListener("input", () => move(at(slider.value / STEPS)));
  reset.addEventListener("click", () => {
    place(limit);
    slider.focus();
  });
  const place = (ms) => {
    slider.value = Math.round(share(ms) * STEPS);
    move(ms);
  };
  dragged(plot.querySelector("#slo-handle"), plot, (part) => place(at(part)));
  place(now.ms);
  return {
    get ms() {
      return now.ms === limit ? undefined : now.ms;
    },
  };
}

/** The best of those that keep the limit; the server has ranked them. */
function winner(marks, ms) {
  let best = null;
  for (const mark of marks) {
    const { rank, latency } = mark.dataset;
    if (rank === "" || latency === "" || Number(latency) > ms) continue;
    if (!best || Number(rank) < Number(best.dataset.rank)) best = mark;
  }
  return best;
}

function dragged(handle, plot, moved) {
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const { left, width } = plot.getBoundingClientRect();
    moved(Math.min(1, Math.max(0, (event.clientX - left) / width)));
  });
}

/** One stop of the tab key for all marks; arrows, Home and End move among them. */
function showRecipes(plot, marks) {
  const tooltip = plot.querySelector("#recipe");
  const hide = () => (tooltip.hidden = true);
  marks.forEach((mark, index) => {
    mark.querySelector("title").remove();
    mark.tabIndex = index === 0 ? 0 : -1;
    const show = () => showRecipe(plot, tooltip, mark);
    mark.addEventListener("pointerenter", show);
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", show);
    mark.addEventListener("blur", hide);
    mark.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: marks.length - 1 };
      if (event.key === "Escape") hide();
      const next = marks[steps[event.key]];
      if (!next) return;
      event.preventDefault();
      mark.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
}

function showRecipe(plot, tooltip, mark) {
  const recipe = document.getElementById(mark.dataset.recipe);
  tooltip.replaceChildren(...[...recipe.cloneNode(true).childNodes]);
  tooltip.hidden = false;
  const frame = plot.getBoundingClientRect();
  const box = mark.querySelector(".hit").getBoundingClientRect();
  const x = box.left + box.width / 2 - frame.left;
  const left = Math.min(Math.max(0, x - tooltip.offsetWidth / 2), frame.width - tooltip.offsetWidth);
  const below = box.bottom - frame.top + 8;
  const above = box.top - frame.top - tooltip.offsetHeight - 8;
  const top = above >= -30 || above > frame.height - below - tooltip.offsetHeight ? above : below;
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${top}px`;
}
