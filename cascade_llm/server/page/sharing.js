// The live view: which running sequences share what, and where the pages of the KV pools are.
// @ts-check
import { at, element } from "./elements.js";
import { ask, eventData } from "./server.js";

/**
 * What /openapi.json publishes as SharingEvent, TenantEvent and EngineEvent.
 * @typedef {{level: number, num_tokens: number, num_sequences: number, kv_bytes_saved: number, text?: string,
 *   runs: Run[], own_lens: number[]}} Run
 * @typedef {{window_len: number | null, num_layers: number, runs: Run[], own_lens: number[]}} Kind
 * @typedef {{step_id: number, num_sequences: number, num_levels: number, num_groups: number, kv_bytes_read: number,
 *   kv_bytes_saved: number, reason: string | null, kinds: Kind[]}} Step
 * @typedef {{window_len: number | null, total_pages: number, free_pages: number, held_pages: number,
 *   cached_pages: number, session_pages: number}} Pool
 * @typedef {{num_tokens: number, num_holders: number, has_pages: boolean, text?: string, runs: CachedRun[],
 *   num_more: number}} CachedRun
 * @typedef {{runs: CachedRun[], num_more: number}} Cache
 * @typedef {{engine: "ready", running_sequences: number, waiting_sequences: number, cache: Cache,
 *   last_step: Step | null, generated_tokens?: number, kv_bytes_saved?: number, pools?: Pool[]}} Ready
 * @typedef {{engine: "starting" | "down" | "ended"}} Silent
 */

const SVG = "http://www.w3.org/2000/svg";
const MOST_STEPS = 60, MOST_OWN_BARS = 12;
const PAUSES_MS = [1000, 2000, 5000, 10000];
const stateLine = at("sharing-state", HTMLParagraphElement), timeline = at("timeline", SVGSVGElement);

export class SharingView {
  constructor() {
    /** @type {{id: number, read: number, saved: number}[]} */
    this.steps = [];
    /** @type {{tokens: number, ms: number} | null} */
    this.before = null;
    /** Where figures are written, by their names. @type {Map<string, HTMLElement>} */
    this.figures = new Map();
    /** What each list was drawn from. @type {Map<Element, string>} */
    this.drawn = new Map();
    /** @type {AbortController | null} */
    this.listening = null;
    document.addEventListener("visibilitychange", () => this.follow());
  }

  /** Listen while the page is to be seen; begins anew where it listened already. */
  follow() {
    this.listening?.abort();
    this.listening = null;
    if (document.hidden) return;
    this.listening = new AbortController();
    this.listen(this.listening.signal);
  }

  /** @param {AbortSignal} signal */
  async listen(signal) {
    for (let failures = 0; !signal.aborted; failures += 1) {
      try {
        for await (const data of eventData(await ask("/v1/cascade/events", { signal }))) {
          failures = 0;
          this.draw(JSON.parse(data));
        }
      } catch (error) {
        if (signal.aborted) return;
        const needsKey = error instanceof Error && error.name === "NeedsKey";
        stateLine.textContent = needsKey ? "The server wants an API key: see Settings." : `No live view: ${error instanceof Error ? error.message : error}.`;
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSES_MS[Math.min(failures, PAUSES_MS.length - 1)]));
    }
  }

  /** @param {Ready | Silent} told */
  draw(told) {
    stateLine.textContent = state(told);
    if (told.engine !== "ready") return;
    const step = told.last_step, read = step?.kv_bytes_read ?? 0, saved = step?.kv_bytes_saved ?? 0, whole = read + saved;
    this.drawFigures([
      ["Running", String(told.running_sequences)],
      ["Waiting", String(told.waiting_sequences)],
      ["Tokens/s", this.rate(told)],
      ["Levels", String(step?.num_levels ?? "–")],
      ["Groups", String(step?.num_groups ?? "–")],
      ["KV read a step", bytes(read)],
      ["KV saved a step", whole ? `${bytes(saved)} (${Math.round((100 * saved) / whole)}\u00a0%)` : bytes(saved)],
      // a key of a tenant is not told what all tenants did
      ["KV saved in all", told.kv_bytes_saved === undefined ? "–" : bytes(told.kv_bytes_saved)],
    ]);
    const pools = told.pools ?? [];
    at("pages", HTMLElement).hidden = !pools.length;
    this.drawList(at("pools", HTMLUListElement), pools, () => pools.map(drawPool));
    this.drawList(at("cache", HTMLUListElement), [told.cache], () => drawCached(told.cache, longestCached(told.cache)));
    if (!step) return;
    if (this.steps.at(-1)?.id !== step.step_id) this.steps = [...this.steps, { id: step.step_id, read, saved }].slice(-MOST_STEPS);
    this.drawTimeline();
    this.drawList(at("tree", HTMLUListElement), step.kinds, () => drawKinds(step.kinds));
  }

  /** Since the event before. @param {Ready} told */
  rate(told) {
    const before = this.before, ms = performance.now(), tokens = told.generated_tokens;
    this.before = tokens === undefined ? null : { tokens, ms };
    if (!before || tokens === undefined || !told.running_sequences || ms - before.ms > 3000 || tokens < before.tokens) return "–";
    return ((1000 * (tokens - before.tokens)) / Math.max(1, ms - before.ms)).toFixed(1);
  }

  /** @param {[string, string][]} figures */
  drawFigures(figures) {
    for (const [name, value] of figures) {
      let place = this.figures.get(name);
      if (!place) {
        place = element("dd");
        this.figures.set(name, place);
        const box = element("div");
        box.append(element("dt", "", name), place);
        at("figures", HTMLDListElement).append(box);
      }
      place.textContent = value;
    }
  }

  /** Fill a list, unless that is what it shows. @param {Element} list @param {object[]} told @param {() => Element[]} draw */
  drawList(list, told, draw) {
    const shape = JSON.stringify(told);
    if (shape !== this.drawn.get(list)) list.replaceChildren(...draw());
    this.drawn.set(list, shape);
  }

  drawTimeline() {
    const most = Math.max(1, ...this.steps.map(({ read, saved }) => read + saved));
    const bars = this.steps.flatMap(({ read, saved }, i) => {
      const x = 120 - 2 * (this.steps.length - i), low = (30 * read) / most, high = (30 * saved) / most;
      return [bar(x, 32 - low, low, "read"), bar(x, 32 - low - high, high, "saved")];
    });
    const last = this.steps.at(-1);
    timeline.replaceChildren(...bars);
    if (last) timeline.setAttribute("aria-label", `KV bytes per step; the last read ${bytes(last.read)} and saved ${bytes(last.saved)}`);
  }
}

/** @param {Ready | Silent} told */
function state(told) {
  if (told.engine !== "ready") return `The engine is ${told.engine}.`;
  const step = told.last_step;
  if (!step) return "No step yet: ask something.";
  const when = told.running_sequences ? "This step" : "Idle. The last step";
  if (step.reason) return `${when} shared nothing: ${step.reason}.`;
  const groups = `${step.num_groups} ${step.num_groups === 1 ? "group" : "groups"}`;
  return `${when} had ${step.num_sequences} sequences, ${groups} with a prefix in common, read on ${step.num_levels - 1} ${step.num_levels === 2 ? "level" : "levels"}.`;
}

/** What layers with this window read. @param {number | null} windowLen */
const reach = (windowLen) => (windowLen === null ? "all tokens" : `the last ${windowLen} tokens`);

/** @param {Pool} pool */
function drawPool(pool) {
  const item = element("li"), whole = element("div", "pool");
  const states = /** @type {const} */ ([["held", pool.held_pages], ["cached", pool.cached_pages]]);
  whole.setAttribute("aria-hidden", "true");
  for (const [name, count] of states) {
    const part = element("div", name);
    part.style.width = `${(100 * count) / pool.total_pages}%`;
    whole.append(part);
  }
  const sessions = pool.session_pages ? ` (${pool.session_pages} by sessions)` : "";
  const told = `${pool.held_pages} held${sessions}, ${pool.cached_pages} cached, ${pool.free_pages} free`;
  item.append(whole, element("div", "", `For layers that read ${reach(pool.window_len)}`), element("small", "", told));
  return item;
}

/** Of several kinds each below its name. @param {Kind[]} kinds */
function drawKinds(kinds) {
  const whole = Math.max(...kinds.map(longest));
  const trees = kinds.map((kind) => drawLevel(kind.runs, kind.own_lens, whole));
  if (trees.length === 1) return trees[0];
  return kinds.map((kind, i) => {
    const item = element("li"), tree = element("ul"), layers = kind.num_layers === 1 ? "1 layer that reads" : `${kind.num_layers} layers that read`;
    tree.append(...trees[i]);
    item.append(element("strong", "", `${layers} ${reach(kind.window_len)}`), tree);
    return item;
  });
}

/** Tokens of the longest sequence. @param {{runs: Run[], own_lens: number[]}} node @returns {number} */
function longest(node) {
  return Math.max(1, ...node.own_lens, ...node.runs.map((run) => run.num_tokens + longest(run)));
}

/** @param {Run[]} runs @param {number[]} ownLens @param {number} whole @returns {HTMLElement[]} */
function drawLevel(runs, ownLens, whole) {
  const items = runs.map((run) => {
    const item = element("li");
    item.append(
      drawBar(run.num_tokens, whole),
      element("div", "", `${run.num_tokens} tokens, read once for ${run.num_sequences} sequences`),
      element("small", "", `level ${run.level}, saves ${bytes(run.kv_bytes_saved)} a step`),
    );
    if (run.text) item.append(element("br"), element("q", "", run.text));
    const inner = element("ul");
    inner.append(...drawLevel(run.runs, run.own_lens, whole));
    item.append(inner);
    return item;
  });
  if (!ownLens.length) return items;
  const item = element("li", "own"), shown = ownLens.slice(0, MOST_OWN_BARS), more = ownLens.length - shown.length;
  const who = ownLens.length === 1 ? "1 sequence" : `${ownLens.length} sequences`;
  item.append(
    element("small", "", `${who} with tokens of their own: ${shown.join(", ")}${more ? ` and ${more} more` : ""}`),
    ...shown.map((length) => drawBar(length, whole)),
  );
  return [...items, item];
}

/** Tokens of the longest path. @param {Cache} node @returns {number} */
function longestCached(node) {
  return Math.max(1, ...node.runs.map((run) => run.num_tokens + longestCached(run)));
}

/** @param {Cache} node @param {number} whole @returns {HTMLElement[]} */
function drawCached(node, whole) {
  const items = node.runs.map((run) => {
    const item = element("li", run.num_holders ? "" : "own"), inner = element("ul");
    const holders = `held by ${run.num_holders} ${run.num_holders === 1 ? "sequence or session" : "sequences and sessions"}`;
    const state = run.num_holders ? holders : run.has_pages ? "cached" : "given up, what is behind it is cached";
    item.append(drawBar(run.num_tokens, whole), element("div", "", `${run.num_tokens} tokens, ${state}`));
    if (run.text) item.append(element("q", "", run.text));
    inner.append(...drawCached(run, whole));
    item.append(inner);
    return item;
  });
  return node.num_more ? [...items, element("li", "", `and ${node.num_more} more`)] : items;
}

/** @param {number} tokens @param {number} whole */
function drawBar(tokens, whole) {
  const made = element("div", "bar");
  made.style.width = `${(100 * tokens) / whole}%`;
  made.setAttribute("aria-hidden", "true");
  return made;
}

/** @param {number} x @param {number} y @param {number} height @param {string} kind */
function bar(x, y, height, kind) {
  const made = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x, y, height, width: 1.6, class: kind })) made.setAttribute(name, String(value));
  return made;
}

/** @param {number} count */
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0, value = count;
  while (value >= 1024 && place < units.length - 1) { value /= 1024; place += 1; }
  return `${place && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
}
