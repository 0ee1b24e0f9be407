/* The page "Background tasks". Asks for the figures once a second and writes into the page only what has changed, so
   that an open traceback stays open and the focus stays where it is. Text is only ever set as text. */
"use strict";

(() => {
  const PERIOD = 1000; // milliseconds between two looks
  const PATIENCE = 10000; // milliseconds between two looks while nobody answers
  const SVG = "http://www.w3.org/2000/svg";
  const OUTCOMES = ["succeeded", "failed", "timed_out", "cancelled", "handed_off", "dropped"];
  const BAD = new Set(["failed", "timed_out", "cancelled", "dropped", "handoff_failures"]);
  const NOTES = {
    local: "The cache is local memory, so only the process that answers can be seen: after a reload it may be another one. "
      + "Name a cache that the processes share in BGTASKS_SNAPSHOT to see all of them.",
    none: "The cache keeps nothing, so only the process that answers can be seen. "
      + "Name a cache that the processes share in BGTASKS_SNAPSHOT to see all of them.",
    off: "BGTASKS_SNAPSHOT is None, so only the process that answers can be seen, and without a history.",
    broken: "The cache does not answer, so only the process that answers can be seen. The log says why.",
  };

  const root = document.getElementById("content-main");
  const byId = (id) => document.getElementById(id);
  const mayPause = root.dataset.mayPause === "true";
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
    for (const item of items) {
      const id = key(item);
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
  const processName = (entry) => `${entry.host}:${entry.pid}`;

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

  // One pool.

  function createPool(pool) {
    const id = `bt-pool-${byId("bt-pools").children.length}-${Date.now()}`;
    const head = element("div", { class: "bt-head" },
      element("h2", { class: "bt-title", id }, "Pool ", element("span", { class: "bt-pool-name" }, pool.name)),
      element("span", { class: "bt-badge" }));
    if (mayPause) {
      const button = element("button", { type: "button", class: "bt-button bt-pause" });
      button.addEventListener("click", () => switchPool(pool.name, button));
      head.append(button);
    }
    const running = table("Running now", ["Task", "#For", "Slot", "Process"], `Tasks of pool ${pool.name} that run now`);
    running.classList.add("bt-running");
    const names = table("Tasks by name",
      ["Task", "#Spawned", "#Waiting", "#Running", "#Succeeded", "#Failed", "#Dropped", "#Other", "#Wait p50", "#Wait p95", "#Run p50", "#Run p95"],
      `Tasks of pool ${pool.name} by name, with the times within which half and 95 % of them waited and ran`);
    names.classList.add("bt-names");
    const failures = element("div", { class: "bt-part bt-failures", hidden: "" },
      element("h3", { class: "bt-subtitle" }, "Last failures"), element("div", { class: "bt-list" }));
    const drops = table("Last drops", ["Task", "Why", "#How many", "Last", "Process"],
      `Tasks that pool ${pool.name} did not accept: how many since the process started, and when the last one was`);
    drops.classList.add("bt-drops");
    return element("section", { class: "bt-card bt-pool", "aria-labelledby": id },
      head,
      element("div", { class: "bt-figures" }, figure("queued", "Waiting"), figure("running", "Slots in use")),
      element("dl", { class: "bt-tiles" }),
      element("p", { class: "bt-quiet", hidden: "" }, "No task yet. What the site spawns will show up here."),
      running, names, failures, drops);
  }

  function poolState(pool) {
    const { stats } = pool;
    if (pool.paused) {
      return ["paused", "warn"];
    }
    if (stats.stuck) {
      return [`${number(stats.stuck)} stuck`, "bad"];
    }
    if (stats.queued >= stats.capacity) {
      return ["full", "bad"];
    }
    if (stats.running >= stats.runners) {
      return ["all slots busy", "warn"];
    }
    return stats.running || stats.queued ? ["running", "good"] : ["idle", "calm"];
  }

  function updatePool(section, pool) {
    const { stats } = pool;
    badge(section.querySelector(".bt-head .bt-badge"), ...poolState(pool));
    const button = section.querySelector(".bt-pause");
    if (button !== null) {
      setText(button, pool.paused ? "Resume" : "Pause");
      setAttribute(button, "aria-label", `${pool.paused ? "Resume" : "Pause"} pool ${pool.name}`);
    }
    const [queue, slots] = section.querySelectorAll(".bt-figure");
    const { queued, running } = pool.history;
    queued[queued.length - 1] = Math.max(queued[queued.length - 1], stats.queued);
    running[running.length - 1] = Math.max(running[running.length - 1], stats.running);
    updateFigure(queue, "Waiting tasks", queued, stats.queued, stats.capacity, scaleFor(queued, stats.capacity));
    updateFigure(slots, "Slots in use", running, stats.running, stats.conn_max, stats.conn_max);
    const tiles = [["spawned", number(stats.spawned)], ["oldest waits", duration(pool.oldest)]];
    for (const outcome of OUTCOMES) {
      tiles.push([words(outcome), number(stats[outcome])]);
    }
    if (stats.handoff_failures) {
      tiles.push(["handoff failures", number(stats.handoff_failures)]);
    }
    sync(section.querySelector(".bt-tiles"), tiles, ([name]) => name,
      ([name]) => element("div", { class: "bt-tile" }, element("dt", {}, capital(name)), element("dd")),
      (tile, [name, value]) => {
        setText(tile.querySelector("dd"), value);
        tile.classList.toggle("bt-alert", BAD.has(name.replace(" ", "_")) && value !== "0");
      });
    section.querySelector(".bt-quiet").hidden = stats.spawned > 0;
    updateRunning(section.querySelector(".bt-running"), pool.running);
    updateNames(section.querySelector(".bt-names"), pool.names);
    updateFailures(section.querySelector(".bt-failures"), pool.failures);
    updateDrops(section.querySelector(".bt-drops"), pool.drops);
  }

  function updateRunning(part, tasks) {
    part.hidden = tasks.length === 0;
    sync(part.querySelector("tbody"), tasks, (task) => `${processName(task)} ${task.slot} ${task.name}`,
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
        const mark = name.querySelector(".bt-name + span");
        mark.hidden = !task.stuck;
        badge(mark, "stuck", "bad");
        const details = name.querySelector("details");
        details.hidden = task.stack === null;
        setText(details.querySelector("pre"), task.stack || "");
        setText(time, duration(task.seconds));
        setText(slot, task.asynchronous ? `${task.slot} (async)` : task.slot || "–");
        setText(process, processName(task));
      });
  }

  function updateNames(part, names) {
    part.hidden = names.length === 0;
    const right = Array(12).fill("bt-number").fill("", 0, 1);
    sync(part.querySelector("tbody"), names, (of) => of.name, () => element("tr"),
      (row, of) => cells(row,
        [of.name, ...["spawned", "queued", "running", "succeeded", "failed", "dropped"].map((what) => number(of[what])),
          number(of.timed_out + of.cancelled + of.handed_off),
          ...["wait_p50", "wait_p95", "run_p50", "run_p95"].map((what) => roughly(of[what]))],
        right.map((style, place) => (
          (place === 5 && of.failed) || (place === 6 && of.dropped) ? `${style} bt-alert` : style))));
  }

  function updateFailures(part, failures) {
    part.hidden = failures.length === 0;
    sync(part.querySelector(".bt-list"), failures, (failure) => `${failure.at} ${processName(failure)} ${failure.name}`,
      (failure) => element("details", { class: "bt-failure" },
        element("summary", {},
          element("span", { class: "bt-when" }, clock(failure.at)), " ",
          element("span", { class: "bt-name" }, failure.name), " ",
          element("span", { class: "bt-error" }, failure.outcome === "failed" ? failure.error : `${words(failure.outcome)}: ${failure.error}`), " ",
          element("span", { class: "bt-quiet" }, `${processName(failure)}, ran ${duration(failure.run_s)}`)),
        element("pre", { tabindex: "0" }, failure.traceback || "Left out: the snapshot would have been too large for the cache.")),
      () => {});
  }

  function updateDrops(part, drops) {
    part.hidden = drops.length === 0;
    const why = {
      full: "queue full", shutdown: "shut down", no_thread: "no thread", no_loop: "no event loop", propagator: "propagator failed",
    };
    sync(part.querySelector("tbody"), drops, (drop) => `${processName(drop)} ${drop.reason} ${drop.name}`,
      () => element("tr"),
      (row, drop) => cells(row,
        [drop.name, why[drop.reason] || drop.reason, drop.count === null ? "–" : number(drop.count),
          drop.at === null ? "earlier" : clock(drop.at), processName(drop)],
        ["", "", "bt-number", "", ""]));
  }

  // The processes.

  const STATES = { active: ["active", "good"], idle: ["idle", "calm"], silent: ["silent", "bad"], dead: ["drainer dead", "bad"], blocked: ["loop blocked", "bad"] };

  function updateProcesses(processes) {
    const rows = processes.flatMap((process) => process.pools.map((pool, place) => ({ process, pool, first: place === 0 })));
    sync(byId("bt-processes").querySelector("tbody"), rows, ({ process, pool }) => `${process.id} ${pool.name}`,
      () => {
        const row = element("tr");
        cells(row, Array(11).fill(""), ["", "", "", "", "", "", "bt-number", "bt-number", "bt-number", "", ""]);
        row.children[1].append(element("span"));
        row.children[5].append(element("div", { class: "bt-sparks" }, chart("queued"), chart("running")));
        return row;
      },
      (row, { process, pool, first }) => {
        const [name, state, poolName, waiting, running, history, succeeded, failed, dropped, up, word] = row.children;
        row.classList.toggle("bt-more", !first);
        setText(name, processName(process) + (process.here ? " (answers)" : ""));
        badge(state.firstChild, ...(pool.paused ? ["paused", "warn"] : STATES[process.state]));
        setText(poolName, pool.name);
        setText(waiting, `${number(pool.stats.queued)} of ${number(pool.stats.capacity)}`);
        setText(running, `${number(pool.stats.running)} of ${number(pool.stats.conn_max)}`);
        const [queue, slots] = history.querySelectorAll("svg");
        const who = `process ${processName(process)}, pool ${pool.name}`;
        draw(queue, pool.history.queued, pool.stats.capacity, scaleFor(pool.history.queued, pool.stats.capacity),
          `Waiting tasks over the last 5 minutes, ${who}: highest ${Math.max(...pool.history.queued)}`);
        draw(slots, pool.history.running, pool.stats.conn_max, pool.stats.conn_max,
          `Slots in use over the last 5 minutes, ${who}: highest ${Math.max(...pool.history.running)}`);
        setText(succeeded, number(pool.stats.succeeded));
        setText(failed, number(pool.stats.failed));
        setText(dropped, number(pool.stats.dropped));
        setText(up, whole(process.up));
        setText(word, process.here ? "now" : `${whole(process.age)} ago`);
      });
    byId("bt-processes").hidden = false;
  }

  // What a screen reader shall hear of: what is new and matters, not each figure.

  let known = null;

  function tellNews(data) {
    const failures = new Set();
    const states = new Map();
    const news = [];
    for (const pool of data.pools) {
      const [state, kind] = poolState(pool);
      states.set(pool.name, state);
      if (known !== null && known.states.get(pool.name) !== state && (kind === "bad" || state === "paused")) {
        news.push(`Pool ${pool.name}: ${state}.`);
      }
      for (const failure of pool.failures) {
        const id = `${failure.at} ${processName(failure)} ${failure.name}`;
        failures.add(id);
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
  }

  function show(data) {
    const count = data.processes.length;
    const silent = data.processes.filter((process) => ["silent", "dead", "blocked"].includes(process.state)).length;
    const running = data.pools.reduce((sum, pool) => sum + pool.stats.running, 0);
    const queued = data.pools.reduce((sum, pool) => sum + pool.stats.queued, 0);
    setText(byId("bt-summary"), `${count} ${count === 1 ? "process" : "processes"}`
      + `${silent ? `, ${silent} of them silent, dead or blocked` : ""} · ${number(running)} running · ${number(queued)} waiting · ${clock(data.at)}`);
    note(NOTES[data.sight]);
    sync(byId("bt-pools"), data.pools, (pool) => pool.name, createPool, updatePool);
    updateProcesses(data.processes);
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
      note(`The site does not answer (${error.message}). What is shown is old; the page goes on trying.`);
      later(PATIENCE);
      return;
    }
    later(PERIOD);
    show(data);
  }

  async function switchPool(pool, button) {
    const paused = button.textContent === "Pause";
    button.disabled = true;
    try {
      const response = await fetch(root.dataset.pauseUrl, {
        method: "POST",
        headers: { "X-CSRFToken": token },
        body: new URLSearchParams({ pool, paused: String(paused) }),
        credentials: "same-origin",
      });
      if (!response.ok) {
        note(`The pool could not be ${paused ? "paused" : "resumed"} (status ${response.status}).`);
        return;
      }
      setText(byId("bt-news"), `Pool ${pool} is ${paused ? "paused" : "resumed"}.`);
      await look();
    } finally {
      button.disabled = false;
      button.focus();
    }
  }

  byId("bt-freeze").addEventListener("click", (event) => {
    frozen = !frozen;
    setAttribute(event.currentTarget, "aria-pressed", String(frozen));
    setText(event.currentTarget, frozen ? "Go on" : "Hold still");
    later(0);
  });
  document.addEventListener("visibilitychange", () => later(0));
  look();
})();
