/* The page "Background tasks". Asks for the figures once a second and writes into the page only what has changed, so
   that an open traceback stays open and the focus stays where it is. Text is only ever set as text. */
"use strict";

(() => {
  const PERIOD = 1000; // milliseconds between two looks
  const PATIENCE = 10000; // milliseconds between two looks while nobody answers
  const OPEN_MAX = 3; // pools of a site that are all open at the start
  const SVG = "http://www.w3.org/2000/svg";
  // Figures of a pool that are always shown, and those that are if there is something to show.
  const ALWAYS = ["succeeded", "failed", "dropped"];
  const SOMETIMES = ["shed", "timed_out", "cancelled", "coalesced", "retried", "handed_off", "stuck", "handoff_failures"];
  const BAD = new Set(["failed", "timed out", "cancelled", "shed", "dropped", "stuck", "handoff failures"]);
  const OPTIONAL = [3, 8, 10, 11, 12]; // columns by name that are left out if all is zero
  const SHARED = " Name a cache that the processes share in CACHES and BGTASKS_SNAPSHOT to see all of them.";
  const NOTES = {
    local: `The cache is local memory, so only the process that answers can be seen: after a reload it may be another one.${SHARED}`,
    none: `The cache keeps nothing, so only the process that answers can be seen.${SHARED}`,
    off: "BGTASKS_SNAPSHOT is None, so only the process that answers can be seen, and without a history.",
    broken: "The cache does not answer, so only the process that answers can be seen. The log says why.",
  };
  const KINDS = { well: "good", full: "bad", stuck: "bad", paused: "warn", "not seen": "bad" };

  const root = document.getElementById("content-main");
  const byId = (id) => document.getElementById(id);
  const mayPause = root.dataset.mayPause === "true";
  const mayCancel = root.dataset.mayCancel === "true";
  const token = root.querySelector("[name=csrfmiddlewaretoken]").value;

  // Small tools.

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function shape(tag, attributes = {}) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) {
      node.setAttribute(name, value);
    }
    return node;
  }

  function setText(node, text) {
    if (node.textContent !== text) {
      node.textContent = text;
    }
  }

  function setAttribute(node, name, value) {
    if (node.getAttribute(name) !== value) {
      node.setAttribute(name, value);
    }
  }

  /* Make the children of `parent` one for each item, in their order, and keep those that are there. */
  function sync(parent, items, key, create, update) {
    const old = new Map(Array.from(parent.children, (child) => [child.dataset.key, child]));
    let place = parent.firstElementChild;
    const seen = new Map();
    for (const item of items) {
      const same = seen.get(key(item)) || 0; // so many before it have this key
      seen.set(key(item), same + 1);
      const id = same ? `${key(item)} ${same}` : key(item);
      let child = old.get(id);
      old.delete(id);
      if (child === undefined) {
        child = create(item);
        child.dataset.key = id;
      }
      update(child, item);
      if (child === place) {
        place = place.nextElementSibling;
      } else {
        parent.insertBefore(child, place);
      }
    }
    old.forEach((child) => child.remove());
  }

  const number = (value) => value.toLocaleString("en");
  const words = (label) => label.replaceAll("_", " ");
  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

  function duration(seconds) {
    if (seconds === null) {
      return "–";
    }
    if (seconds < 1) {
      return `${seconds < 0.01 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
    }
    if (seconds < 60) {
      return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
    }
    if (seconds < 3600) {
      return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
    }
    return seconds < 86400
      ? `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`
      : `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
  }

  // A percentile, of which two digits are known, and none below a tenth of a millisecond.
  function roughly(seconds) {
    if (seconds === null) {
      return "–";
    }
    if (seconds < 0.0001) {
      return "<0.1 ms";
    }
    const [value, unit] = seconds < 1 ? [seconds * 1000, "ms"]
      : seconds < 100 ? [seconds, "s"]
      : seconds < 6000 ? [seconds / 60, "min"]
      : [seconds / 3600, "h"];
    return `${Number(value.toPrecision(2))} ${unit}`;
  }

  const whole = (seconds) => duration(seconds < 1 ? 0 : Math.round(seconds)).replace("0.0 ms", "0 s").replace(".0 s", " s");
  const zero = (value) => (value ? number(value) : "–");
  let twins = new Set(); // host and process id of several processes: containers

  function processName(entry) {
    const name = `${entry.host}:${entry.pid}`;
    return entry.process && twins.has(name) ? `${name} (${entry.process.slice(-4)})` : name;
  }

  /* The time, with the day if that is not today. */
  function moment(at) {
    const day = new Date(at * 1000);
    return day.toDateString() === new Date().toDateString() ? clock(at)
      : `${day.toLocaleDateString([], { day: "numeric", month: "short" })} ${clock(at)}`;
  }

  // Charts: a line over a filled area, and the bound as a dashed line where it lies in sight.

  const WIDTH = 300;
  const HEIGHT = 72;

  function chart(kind) {
    const svg = shape("svg", {
      class: `bt-chart bt-kind-${kind}`, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    });
    for (const share of [0.25, 0.5, 0.75]) {
      svg.append(shape("line", { class: "bt-grid", x1: 0, x2: WIDTH, y1: HEIGHT * share, y2: HEIGHT * share }));
    }
    svg.append(shape("path", { class: "bt-area" }), shape("path", { class: "bt-line" }), shape("line", { class: "bt-bound", x1: 0, x2: WIDTH }));
    return svg;
  }

  function draw(svg, values, bound, scale, label) {
    const y = (value) => (HEIGHT - 1 - (HEIGHT - 3) * Math.min(1, value / scale)).toFixed(1);
    const points = values.map((value, place) => `${(place * WIDTH / (values.length - 1)).toFixed(1)},${y(value)}`);
    const line = `M${points.join("L")}`;
    setAttribute(svg.querySelector(".bt-line"), "d", line);
    setAttribute(svg.querySelector(".bt-area"), "d", `${line}L${WIDTH},${HEIGHT}L0,${HEIGHT}Z`);
    const mark = svg.querySelector(".bt-bound");
    mark.classList.toggle("bt-gone", bound > scale);
    setAttribute(mark, "y1", y(bound));
    setAttribute(mark, "y2", y(bound));
    setAttribute(svg, "aria-label", label);
  }

  /* A scale on which the figures can be seen, and the bound as soon as they come near it. */
  function scaleFor(values, bound) {
    const peak = Math.max(...values);
    if (peak > bound / 2) {
      return bound;
    }
    return [5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((step) => step >= peak && step <= bound) || bound;
  }

  function figure(kind, title) {
    return element("figure", { class: "bt-figure" },
      element("figcaption", {}, element("span", { class: "bt-name" }, title), element("span", { class: "bt-now" })),
      element("div", { class: "bt-plot" }, chart(kind), element("span", { class: "bt-scale", "aria-hidden": "true" })),
      element("div", { class: "bt-axis", "aria-hidden": "true" }, element("span", {}, "5 min ago"), element("span", {}, "now")));
  }

  function updateFigure(node, title, values, now, bound, scale) {
    setText(node.querySelector(".bt-now"), `${number(now)} of ${number(bound)}`);
    setText(node.querySelector(".bt-scale"), number(scale));
    draw(node.querySelector("svg"), values, bound, scale,
      `${title} over the last 5 minutes: now ${now}, highest ${Math.max(...values)}, bound ${bound}`);
  }

  // Tables.

  function table(title, heads, caption) {
    const row = element("tr");
    for (const head of heads) {
      const name = head.replace("#", "");
      row.append(element("th", head === name ? { scope: "col" } : { scope: "col", class: "bt-number" }, name));
    }
    return element("div", { class: "bt-part", hidden: "" },
      element("h3", { class: "bt-subtitle" }, title),
      element("div", { class: "bt-scroll", role: "region", "aria-label": caption, tabindex: "0" },
        element("table", {},
          element("caption", { class: "visually-hidden" }, caption),
          element("thead", {}, row),
          element("tbody"))));
  }

  function cells(row, texts, classes = []) {
    texts.forEach((text, place) => {
      let cell = row.children[place];
      if (cell === undefined) {
        cell = element(place ? "td" : "th", place ? {} : { scope: "row" });
        row.append(cell);
      }
      setText(cell, text);
      if (cell.className !== (classes[place] || "")) {
        cell.className = classes[place] || "";
      }
    });
  }

  function badge(node, text, kind) {
    setText(node, text);
    setAttribute(node, "class", `bt-badge bt-${kind}`);
  }

  // All pools at a glance.

  const poolId = (name) => `bt-pool-${encodeURIComponent(name)}`;

  function linkTo(name) {
    const link = element("a", { href: `#${poolId(name)}` }, name);
    link.addEventListener("click", () => {
      byId(poolId(name)).open = true;
    });
    return link;
  }

  function updateVerdict(data) {
    const unwell = data.pools.filter((pool) => pool.state !== "well");
    const worth = data.pools.some((pool) => pool.advice.length) || data.unread.length || data.losses.length;
    const named = unwell.slice(0, 3).map((pool) => `${pool.name} is ${pool.state}`).join(", ");
    const more = unwell.length > 3 ? ` and ${unwell.length - 3} more` : "";
    badge(byId("bt-verdict").firstElementChild, data.state, KINDS[data.state]);
    setText(byId("bt-verdict").lastElementChild,
      unwell.length ? `${unwell.length} of ${data.pools.length} pools ${unwell.length === 1 ? "is" : "are"} not well: ${named}${more}`
        : `All pools are well${worth ? ", with something to look at" : ""}`);
  }

  function updateTodo(data) {
    const items = data.pools.flatMap((pool) => pool.advice.map((text) => ({ pool: pool.name, text })));
    byId("bt-todo").hidden = items.length === 0;
    sync(byId("bt-todo").querySelector("ul"), items, ({ pool, text }) => `${pool} ${text}`,
      ({ pool, text }) => element("li", {}, linkTo(pool), ": ", text), () => {});
  }

  function updateStates(pools) {
    sync(byId("bt-states").querySelector("tbody"), pools, (pool) => pool.name,
      (pool) => {
        const row = element("tr", {}, element("th", { scope: "row" }, linkTo(pool.name)), element("td", {}, element("span")));
        for (let place = 0; place < 8; place += 1) {
          row.append(element("td", { class: "bt-number" }));
        }
        return row;
      },
      (row, pool) => {
        const { stats } = pool;
        badge(row.children[1].firstChild, pool.state, KINDS[pool.state]);
        const texts = [`${number(stats.queued)} of ${number(stats.capacity)}`, duration(pool.oldest), zero(pool.delayed),
          `${number(stats.running)} of ${number(stats.conn_max)}`, zero(stats.succeeded), zero(stats.failed), zero(stats.dropped), zero(stats.shed)];
        texts.forEach((text, place) => setText(row.children[place + 2], text));
        mark(row.children[2], stats.queued >= stats.capacity);
        [stats.failed, stats.dropped, stats.shed].forEach((value, place) => mark(row.children[7 + place], value > 0));
      });
  }

  function mark(cell, isBad) {
    cell.classList.toggle("bt-alert", isBad);
  }

  // One pool.

  function createPool(pool, count) {
    const pausing = element("p", { class: "bt-pausing" }, element("span"));
    if (mayPause) {
      const button = element("button", { type: "button", class: "bt-button bt-pause" });
      button.addEventListener("click", () => switchPool(section.pool, button));
      pausing.append(" ", button);
    }
    const running = table("Running now", ["Task", "#For", "Slot", "Process"], `Tasks of pool ${pool.name} that run now`);
    running.classList.add("bt-running");
    const names = table("Tasks by name",
      ["Task", "#Waiting", "#Oldest", "#Delayed", "#Running", "#Spawned", "#Succeeded", "#Failed", "#Retried", "#Dropped", "#Shed", "#Coalesced", "#Other",
        "#Wait p50", "#Wait p95", "#Run p50", "#Run p95"],
      `Tasks of pool ${pool.name} by name, with the times within which half and 95 % of them waited and ran`);
    names.classList.add("bt-names");
    const failures = element("div", { class: "bt-part bt-failures", hidden: "" },
      element("h3", { class: "bt-subtitle" }, "Failures"), element("div", { class: "bt-list" }));
    const drops = table("Dropped", ["Task", "Why", "#How many", "Last", "Process"],
      `Tasks that pool ${pool.name} did not accept: how many since the process started, and when the last one was`);
    drops.classList.add("bt-drops");
    for (const part of [names, failures, drops]) {
      part.append(element("p", { class: "bt-quiet bt-rest", hidden: "" }));
    }
    const section = element("details", { class: "bt-card bt-pool", id: poolId(pool.name) },
      element("summary", { class: "bt-head" },
        element("h2", { class: "bt-title" }, "Pool ", element("span", { class: "bt-pool-name" }, pool.name)), " ",
        element("span", { class: "bt-badge" }), " ", element("span", { class: "bt-quiet bt-brief" })),
      element("div", { class: "bt-figures" }, figure("queued", "Waiting"), figure("running", "Slots in use")),
      element("dl", { class: "bt-tiles" }),
      element("p", { class: "bt-quiet bt-nothing", hidden: "" }, "No task yet. What the site spawns will show up here."),
      failures, running, names, drops, pausing);
    section.open = count <= OPEN_MAX || pool.state !== "well";
    section.addEventListener("toggle", () => updatePool(section, section.pool));
    return section;
  }

  function updatePool(section, pool) {
    const { stats } = pool;
    section.pool = pool;
    badge(section.querySelector(".bt-head .bt-badge"), pool.state, KINDS[pool.state]);
    setText(section.querySelector(".bt-brief"), `${number(stats.running)} running, ${number(stats.queued)} waiting in ${pool.processes} ${pool.processes === 1 ? "process" : "processes"}`);
    if (!section.open) {
      return;
    }
    updatePausing(section.querySelector(".bt-pausing"), pool);
    const [queue, slots] = section.querySelectorAll(".bt-figure");
    const { queued, running } = pool.history;
    queued[queued.length - 1] = Math.max(queued[queued.length - 1], stats.queued);
    running[running.length - 1] = Math.max(running[running.length - 1], stats.running);
    updateFigure(queue, "Waiting tasks", queued, stats.queued, stats.capacity, scaleFor(queued, stats.capacity));
    updateFigure(slots, "Slots in use", running, stats.running, stats.conn_max, stats.conn_max);
    updateTiles(section.querySelector(".bt-tiles"), pool);
    section.querySelector(".bt-nothing").hidden = stats.spawned > 0;
    updateRunning(section.querySelector(".bt-running"), pool.running);
    updateNames(section.querySelector(".bt-names"), pool);
    updateFailures(section.querySelector(".bt-failures"), pool);
    updateDrops(section.querySelector(".bt-drops"), pool);
  }

  function updatePausing(part, pool) {
    const { pause } = pool;
    const who = pause && pause.by ? ` by ${pause.by}, ${moment(pause.at)}` : "";
    setText(part.firstChild, pool.paused ? `Paused${who}. It accepts tasks and runs none.` : "");
    part.classList.toggle("bt-note", pool.paused);
    part.hidden = !pool.paused && !mayPause;
    const button = part.querySelector(".bt-pause");
    if (button !== null) {
      setText(button, pool.paused ? "Resume pool" : "Pause pool…");
      setAttribute(button, "aria-label", pool.paused ? `Resume pool ${pool.name}` : `Pause pool ${pool.name}`);
    }
  }

  function updateTiles(list, pool) {
    const { stats } = pool;
    const tiles = [["spawned", number(stats.spawned)], ["oldest waits", duration(pool.oldest)],
      ...ALWAYS.map((what) => [what, number(stats[what])]),
      ...SOMETIMES.filter((what) => stats[what]).map((what) => [words(what), number(stats[what])])];
    if (pool.delayed) {
      tiles.push(["delayed", `${number(pool.delayed)}, first in ${whole(pool.due)}`]);
    }
    sync(list, tiles, ([name]) => name,
      ([name]) => element("div", { class: "bt-tile" }, element("dt", {}, capital(name)), element("dd")),
      (tile, [name, value]) => {
        setText(tile.querySelector("dd"), value);
        tile.classList.toggle("bt-alert", BAD.has(name) && value !== "0");
      });
  }

  function updateRunning(part, tasks) {
    part.hidden = tasks.length === 0;
    sync(part.querySelector("tbody"), tasks, (task) => `${task.process} ${task.slot} ${task.name}`,
      () => {
        const row = element("tr");
        cells(row, ["", "", "", ""], ["", "bt-number", "", ""]);
        const [name] = row.children;
        name.append(element("span", { class: "bt-name" }), element("span", { hidden: "" }),
          element("details", { hidden: "" }, element("summary", {}, "Where it is"), element("pre", { tabindex: "0" })));
        return row;
      },
      (row, task) => {
        const [name, time, slot, process] = row.children;
        setText(name.querySelector(".bt-name"), task.name);
        const stuck = name.querySelector(".bt-name + span");
        stuck.hidden = !task.stuck;
        badge(stuck, "stuck", "bad");
        const details = name.querySelector("details");
        details.hidden = task.stack === null;
        setText(details.querySelector("pre"), task.stack || "");
        setText(time, duration(task.seconds));
        setText(slot, task.asynchronous ? `${task.slot} (async)` : task.slot || "–");
        setText(process, processName(task));
      });
  }

  function rest(part, known, shown, what) {
    const left = part.querySelector(".bt-rest");
    left.hidden = known <= shown;
    setText(left, known > shown ? `${number(known - shown)} more ${what} are not shown.` : "");
  }

  function updateNames(part, pool) {
    part.hidden = pool.names.length === 0;
    sync(part.querySelector("tbody"), pool.names, (of) => of.name,
      (of) => {
        const row = element("tr");
        cells(row, Array(17).fill(""), Array(17).fill("bt-number").fill("", 0, 1));
        const [name] = row.children;
        name.append(element("span", { class: "bt-name" }));
        if (mayCancel) {
          const button = element("button", { type: "button", class: "bt-button bt-cancel", "aria-label": `Cancel waiting tasks called ${of.name}` }, "Cancel…");
          button.addEventListener("click", () => cancelWaiting(part.closest(".bt-pool").pool, of.name, button));
          name.append(button);
        }
        return row;
      },
      (row, of) => {
        const retry = of.delayed ? `${number(of.delayed)}, in ${whole(of.due)}` : "–";
        const other = of.timed_out + of.cancelled + of.handed_off;
        const texts = [zero(of.queued), duration(of.oldest), retry,
          ...[of.running, of.spawned, of.succeeded, of.failed, of.retried, of.dropped, of.shed, of.coalesced, other].map(zero),
          ...["wait_p50", "wait_p95", "run_p50", "run_p95"].map((what) => roughly(of[what]))];
        const [name, ...figures] = row.children;
        setText(name.querySelector(".bt-name"), of.name);
        texts.forEach((text, place) => setText(figures[place], text));
        mark(row.children[7], of.failed > 0);
        mark(row.children[9], of.dropped > 0);
        mark(row.children[10], of.shed > 0);
        if (mayCancel) {
          name.querySelector(".bt-cancel").hidden = !(of.single && of.queued);
        }
      });
    const rows = part.querySelectorAll("tr");
    for (const column of OPTIONAL) {
      const empty = Array.from(rows).slice(1).every((row) => row.children[column].textContent === "–");
      rows.forEach((row) => {
        row.children[column].hidden = empty;
      });
    }
    rest(part, pool.names_known, pool.names.length, "names");
  }

  function updateFailures(part, pool) {
    part.hidden = pool.failures.length === 0;
    sync(part.querySelector(".bt-list"), pool.failures, (failure) => `${failure.name} ${failure.outcome} ${failure.error} ${failure.where}`,
      () => element("details", { class: "bt-failure" },
        element("summary", {},
          element("span", { class: "bt-name" }), " ", element("span", { class: "bt-times" }), " ",
          element("span", { class: "bt-error" }), " ", element("span", { class: "bt-quiet bt-when" })),
        element("pre", { tabindex: "0" })),
      (entry, failure) => {
        const said = failure.message ? `${failure.error}: ${failure.message}` : failure.error;
        const others = failure.processes > 1 ? ` and ${failure.processes - 1} more` : "";
        setText(entry.querySelector(".bt-name"), failure.name);
        setText(entry.querySelector(".bt-times"), `× ${number(failure.times)}`);
        setText(entry.querySelector(".bt-error"), failure.outcome === "failed" ? said : `${words(failure.outcome)}: ${said}`);
        setText(entry.querySelector(".bt-when"), `${failure.times > 1 ? `${moment(failure.since)} to ` : ""}${moment(failure.at)}, `
          + `${processName(failure)}${others}, ran ${duration(failure.run_s)}`);
        setText(entry.querySelector("pre"), failure.traceback || "Left out: the snapshot would have been too large for the cache.");
      });
    rest(part, pool.failures_known, pool.failures.length, "kinds of failures");
  }

  function updateDrops(part, pool) {
    part.hidden = pool.drops.length === 0;
    const why = {
      full: "queue full", shutdown: "shut down", no_thread: "no thread", no_loop: "no event loop", propagator: "propagator failed",
    };
    sync(part.querySelector("tbody"), pool.drops, (drop) => `${drop.process} ${drop.reason} ${drop.name}`,
      () => element("tr"),
      (row, drop) => cells(row,
        [drop.name, why[drop.reason] || drop.reason, drop.count === null ? "–" : number(drop.count),
          drop.at === null ? "earlier" : moment(drop.at), processName(drop)],
        ["", "", "bt-number", "", ""]));
    rest(part, pool.drops_known, pool.drops.length, "rows");
  }

  // The processes.

  const STATES = { active: ["active", "good"], idle: ["idle", "calm"], silent: ["not seen", "bad"], dead: ["drainer dead", "bad"], blocked: ["loop blocked", "bad"] };

  function atWork(pool) {
    const parts = [];
    if (pool.state !== "well") {
      parts.push(pool.state);
    }
    if (pool.running) {
      parts.push(`${number(pool.running)} of ${number(pool.conn_max)} running`);
    }
    if (pool.queued) {
      parts.push(`${number(pool.queued)} of ${number(pool.capacity)} waiting`);
    }
    return parts.length ? `${pool.name}: ${parts.join(", ")}` : "";
  }

  function updateProcesses(data) {
    const sum = (process, what) => process.pools.reduce((total, pool) => total + pool[what], 0);
    sync(byId("bt-processes").querySelector("tbody"), data.processes, (process) => process.id,
      () => {
        const row = element("tr");
        cells(row, Array(9).fill(""), ["", "", "bt-wide", ...Array(6).fill("bt-number")]);
        row.children[1].append(element("span"));
        return row;
      },
      (row, process) => {
        const [name, state, work, succeeded, failed, dropped, shed, up, seen] = row.children;
        setText(name, processName({ ...process, process: process.id }) + (process.here ? " (answers)" : ""));
        badge(state.firstChild, ...STATES[process.state]);
        const busy = process.pools.map(atWork).filter(Boolean);
        setText(work, busy.length > 5 ? `${busy.slice(0, 5).join("; ")}; and ${busy.length - 5} more pools` : busy.join("; ") || "–");
        setText(succeeded, zero(sum(process, "succeeded")));
        [[failed, "failed"], [dropped, "dropped"], [shed, "shed"]].forEach(([cell, what]) => {
          setText(cell, zero(sum(process, what)));
          mark(cell, sum(process, what) > 0);
        });
        setText(up, whole(process.up));
        setText(seen, process.here ? "now" : `${whole(process.age)} ago`);
      });
    sync(byId("bt-unread"), data.unread, (of) => of.process, () => element("li", { class: "bt-error" }),
      (item, of) => setText(item, `The snapshot of ${of.process} ${of.problem}.`));
  }

  // The processes that were killed, as their journals say.

  function updateLosses(losses) {
    byId("bt-losses").hidden = losses.length === 0;
    sync(byId("bt-losses").querySelector("ul"), losses, (loss) => `${loss.at} ${processName(loss)}`,
      (loss) => element("li", {}, `${clock(loss.at)} `,
        element("span", { class: "bt-name" }, processName(loss)), ` was killed with ${number(loss.tasks)} tasks: ${loss.names}`),
      () => {});
  }

  // What a screen reader announces: what is new and matters, not each figure.

  let known = null;

  function tellNews(data) {
    const failures = new Map();
    const states = new Map();
    const news = [];
    for (const pool of data.pools) {
      states.set(pool.name, pool.state);
      if (known !== null && known.states.get(pool.name) !== pool.state && pool.state !== "well") {
        news.push(`Pool ${pool.name}: ${pool.state}.`);
      }
      for (const failure of pool.failures) {
        const id = `${pool.name} ${failure.name} ${failure.error} ${failure.where}`;
        failures.set(id, failure.times);
        if (known !== null && !known.failures.has(id)) {
          news.push(`Task ${failure.name} failed: ${failure.error}.`);
        }
      }
    }
    known = { failures, states };
    if (news.length) {
      setText(byId("bt-news"), news.slice(0, 3).join(" "));
    }
  }

  // Looking.

  function note(text) {
    byId("bt-note").hidden = !text;
    setText(byId("bt-note"), text || "");
    begin();
  }

  function begin() {
    byId("bt-start").hidden = true;
    byId("bt-main").hidden = false;
  }

  function show(data) {
    const labels = data.processes.map((process) => `${process.host}:${process.pid}`);
    twins = new Set(labels.filter((label, place) => labels.indexOf(label) !== place));
    const running = data.pools.reduce((sum, pool) => sum + pool.stats.running, 0);
    const queued = data.pools.reduce((sum, pool) => sum + pool.stats.queued, 0);
    setText(byId("bt-summary"), `${number(labels.length)} ${labels.length === 1 ? "process" : "processes"}`
      + ` · ${number(running)} running · ${number(queued)} waiting · ${clock(data.at)}`);
    note(NOTES[data.sight]);
    updateVerdict(data);
    updateTodo(data);
    updateStates(data.pools);
    sync(byId("bt-pools"), data.pools, (pool) => pool.name, (pool) => createPool(pool, data.pools.length), updatePool);
    updateProcesses(data);
    updateLosses(data.losses);
    tellNews(data);
  }

  let frozen = false;
  let timer = null;

  function later(delay) {
    clearTimeout(timer);
    timer = frozen || document.hidden ? null : setTimeout(look, delay);
  }

  async function look() {
    let data;
    try {
      const response = await fetch(root.dataset.url, { headers: { Accept: "application/json" }, credentials: "same-origin" });
      if (response.redirected || response.status === 403) {
        note("You are no longer logged in, or no longer allowed to look. Reload the page.");
        return;
      }
      if (!response.ok) {
        throw new Error(`status ${response.status}`);
      }
      data = await response.json();
    } catch (error) {
      note(`The site does not answer (${error.message}). These figures are old; the page keeps trying.`);
      later(PATIENCE);
      return;
    }
    later(PERIOD);
    show(data);
  }

  // Orders.

  let asked = null; // who waits for the answer

  /* Ask whether to go on; the answer is a promise of true or false. */
  function confirmed(title, text, yes) {
    const dialog = byId("bt-dialog");
    setText(dialog.querySelector("h2"), title);
    setText(dialog.querySelector("p"), text);
    setText(dialog.querySelector("[value=yes]"), yes);
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((resolve) => {
      asked?.(false);
      asked = resolve;
    });
  }

  // The event comes later than the end of the question, which may have been asked again by then.
  byId("bt-dialog").addEventListener("close", (event) => {
    if (!event.currentTarget.open) {
      asked?.(event.currentTarget.returnValue === "yes");
      asked = null;
    }
  });

  for (const button of byId("bt-dialog").querySelectorAll("button")) {
    button.addEventListener("click", () => byId("bt-dialog").close(button.value));
  }

  /* Send an order, and show what `say` makes of the answer. */
  async function order(url, fields, button, say) {
    button.disabled = true;
    let text;
    try {
      const response = await fetch(url, {
        method: "POST",
        headers: { "X-CSRFToken": token },
        body: new URLSearchParams(fields),
        credentials: "same-origin",
      });
      const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
      const answer = isJson ? await response.json() : {};
      text = response.redirected ? "You are no longer logged in. Reload the page."
        : response.ok ? say(answer) : `That could not be done: ${answer.error || `status ${response.status}`}.`;
    } catch (error) {
      text = `That could not be done: ${error.message}.`;
    } finally {
      button.disabled = false;
    }
    byId("bt-answer").hidden = false;
    setText(byId("bt-answer"), text);
    await look();
    button.focus();
  }

  async function switchPool(pool, button) {
    const paused = !pool.paused;
    const count = `${pool.processes} ${pool.processes === 1 ? "process" : "processes"}`;
    if (paused && !await confirmed(`Pause pool ${pool.name}?`,
      `Its tasks will wait in all ${count}, until somebody resumes the pool. Tasks that run already will finish. Once the queue is full, further tasks are dropped.`,
      "Pause pool")) {
      return;
    }
    await order(root.dataset.pauseUrl, { pool: pool.name, paused: String(paused) }, button, (answer) => (
      answer.told ? `Pool ${pool.name} is ${paused ? "paused" : "resumed"}. The other processes follow with their next snapshot.`
        : `Pool ${pool.name} is resumed in the process that answered. The cache does not answer: the other processes follow once it does.`));
  }

  async function cancelWaiting(pool, name, button) {
    const of = pool.names.find((each) => each.name === name);
    const count = of === undefined ? 0 : of.queued;
    if (!await confirmed(`Cancel the waiting tasks called ${name}?`,
      `${number(count)} of them wait in pool ${pool.name} now. They will not run, and count as cancelled. Tasks that run already are not affected.`,
      "Cancel waiting tasks")) {
      return;
    }
    await order(root.dataset.cancelUrl, { pool: pool.name, name }, button, (answer) => (
      `The process that answered has cancelled ${number(answer.here)} tasks called ${name}. The others follow with their next snapshot.`));
  }

  byId("bt-freeze").addEventListener("click", (event) => {
    frozen = !frozen;
    setAttribute(event.currentTarget, "aria-pressed", String(frozen));
    setText(event.currentTarget, frozen ? "Refresh again" : "Stop refreshing");
    later(0);
  });
  document.addEventListener("visibilitychange", () => later(0));
  look();
})();
