// Progress as it comes: events say what happens now, and the server draws the rest anew.

const QUIET_MS = 1500;
const POLL_MS = 5000;
const LATER_MS = 5000;

/** A job's events until it ends. */
export function follow(main, setUp) {
  const refresh = refresher(main, () => {
    setUp();
    if ("open" in main.dataset) say(said);
  });
  const source = new EventSource(`/v1/jobs/${main.dataset.job}/events/stream?after=${main.dataset.events}`);
  let doing = "";
  let said = "";
  const say = (text) => {
    said = text || said;
    const now = document.getElementById("now");
    if (now && said) now.textContent = said;
  };
  const told = {
    phase: (payload) => (doing = payload.name),
    trial_began: (payload) => (doing = payload.label),
    trial_climbed: (payload) => `${doing}: ${payload.name}`,
    step: (payload) => `${doing}: ${payload.message}`,
    trial_ended: (payload) => spend(payload.budget),
    verification: (payload) => `load test of ${payload.label}, ${payload.window_s} s`,
    note: () => "",
    load_test: () => "",
    answer: () => "",
    state: () => "",
  };
  for (const [kind, tell] of Object.entries(told))
    source.addEventListener(kind, (event) => {
      say(tell(JSON.parse(event.data).payload));
      if (!["phase", "trial_began", "trial_climbed", "step"].includes(kind)) refresh();
    });
  // The log is no event.
  const timer = setInterval(refresh, LATER_MS);
  // A browser may tell of an error after the stream was closed here, too.
  let isOver = false;
  const stop = () => {
    isOver = true;
    source.close();
    clearInterval(timer);
  };
  source.addEventListener("end", () => {
    stop();
    refresh();
  });
  source.addEventListener("refused", () => {
    stop();
    say("You are logged out: reload the page.");
  });
  source.addEventListener("error", () => {
    if (isOver || source.readyState !== EventSource.CLOSED) return; // it tries again by itself
    clearInterval(timer);
    say("Live progress ended: reload the page.");
  });
}

/** The list of jobs, which others submit as well. */
export function poll(main, setUp) {
  const refresh = refresher(main, setUp);
  setInterval(() => document.hidden || refresh(), POLL_MS);
}

function spend(budget) {
  const bars = document.querySelectorAll("#spent progress");
  for (const bar of bars) bar.value = Math.min(budget.wall_clock_s, budget.max_wall_clock_s);
  return "";
}

/** A function that draws the page's parts anew, at most once in QUIET_MS; one that is asked for
 * meanwhile follows. */
function refresher(main, setUp) {
  const drawn = new Map();
  let running = null;
  let wanted = false;

  async function once() {
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (!answer.ok || answer.redirected) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      main.toggleAttribute("data-open", "open" in fresh.dataset);
      if (replace(main, fresh, drawn)) setUp();
    } catch {
      // The service is away: the next time, then.
    }
  }

  return function refresh() {
    if (running) {
      wanted = true;
      return;
    }
    running = once();
    setTimeout(async () => {
      await running;
      running = null;
      const again = wanted;
      wanted = false;
      if (again) refresh();
    }, QUIET_MS);
  };
}

/** Parts that have changed take the place of the old ones, with what the reader did to them. */
function replace(main, fresh, drawn) {
  const ids = new Set();
  let last = null;
  let changed = false;
  for (const part of [...fresh.querySelectorAll(":scope > [data-live]")]) {
    ids.add(part.id);
    const old = document.getElementById(part.id);
    if (old && drawn.get(part.id) === part.outerHTML) {
      last = old;
      continue;
    }
    drawn.set(part.id, part.outerHTML);
    const made = document.importNode(part, true);
    if (old) exchange(old, made);
    else if (last) last.after(made);
    else main.prepend(made);
    last = made;
    changed = true;
  }
  for (const old of main.querySelectorAll(":scope > [data-live]")) if (!ids.has(old.id)) old.remove();
  return changed;
}

function exchange(old, made) {
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  const log = old.querySelector(".log");
  const place = log ? [log.scrollTop, log.scrollTop + log.clientHeight >= log.scrollHeight - 4] : null;
  for (const one of old.querySelectorAll("details[open][id]")) made.querySelector(`#${one.id}`)?.setAttribute("open", "");
  for (const one of old.querySelectorAll("input:checked[id]")) {
    const same = made.querySelector(`#${one.id}`);
    if (same) same.checked = true;
  }
  old.replaceWith(made);
  if (place) {
    const again = made.querySelector(".log");
    if (again) again.scrollTop = place[1] ? again.scrollHeight : place[0];
  }
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}
