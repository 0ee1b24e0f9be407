// The dashboard: asks the server for its figures twice a second and draws them. Nothing here is needed to sign up.

const WINDOW = 60; // seconds on the chart
const LOWEST = 1, HIGHEST = 20000; // ms on the chart
const EVERY = 400; // ms between two questions
const NAMES = ["idle", "thread", "executor", "executor-8", "bgtasks", "fresh", "stale"];

const script = document.getElementById("dashboard-script");
const byId = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

let samples = []; // [due, ms, ok], as the probe measured them
let bursts = [];
let waiting = { requests: 0, oldest_ms: 0 };
let last = 0; // number of the newest sample we have
let offset = 0; // server clock - our clock, seconds

const now = () => Date.now() / 1000 + offset;

function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${(value / 1000).toFixed(value >= 10000 ? 0 : 1)} s`;
  return `${value.toFixed(value >= 100 ? 0 : 1)} ms`;
}

function percentile(ascending, percent) {
  if (!ascending.length) return null;
  return ascending[Math.max(0, Math.ceil((ascending.length * percent) / 100) - 1)];
}

function write(id, text, bad = false) {
  const element = byId(id);
  if (element.textContent !== String(text)) element.textContent = text;
  element.classList.toggle("bad", bad);
}

function cells(id, total, used) {
  const box = byId(id);
  while (box.children.length < total) box.append(document.createElement("i"));
  while (box.children.length > total) box.lastChild.remove();
  [...box.children].forEach((cell, index) => cell.classList.toggle("on", index < used));
  box.classList.toggle("full", used >= total);
}

function showFigures(live) {
  const recent = samples.filter(([due, latency]) => due + latency / 1000 > now() - 5).map((sample) => sample[1]);
  recent.sort((a, b) => a - b);
  const p99 = percentile(recent, 99);
  write("p50", ms(percentile(recent, 50)));
  write("p99", ms(p99), p99 > 1000);
  write("waiting", live.waiting.requests, live.waiting.requests > 20);
  write("failed", live.failed, live.failed > 0);
  write("mails", live.mails);
  const raised = live.bursts.reduce((sum, burst) => sum + burst.raised, 0);
  write("raised", raised, raised > 0);
  write("succeeded", live.tasks.succeeded);
  write("dropped", live.tasks.dropped, live.tasks.dropped > 0);
  write("shed", live.tasks.shed);
  write("threads", live.threads, live.threads > 100);

  if (live.pool) {
    const { size, used, waiting: inLine } = live.pool;
    cells("pool-cells", size, used);
    write("pool-text", `${used} of ${size} in use, ${inLine} waiting for one`, inLine > 0);
  } else {
    write("pool-text", "SQLite has no connection pool.");
  }
  const tasks = live.tasks;
  cells("slot-cells", tasks.conn_max, tasks.running);
  byId("slot-cells").classList.remove("full"); // all slots busy is how it should be
  write("slot-text", `${tasks.running} of ${tasks.conn_max} slots at work`);
  byId("queue-bar").style.width = `${(100 * tasks.queued) / tasks.capacity}%`;
  write("queue-text", `${tasks.queued} of ${tasks.capacity} places in the queue taken`);
}

function showResults() {
  for (const burst of bursts) {
    const box = document.querySelector(`.mean[data-how="${burst.how}"] .result`);
    if (!box) continue;
    const over = burst.ended !== null;
    const settled = over && now() - burst.ended > 11; // every visit of the burst has its answer, or its timeout
    const state = `${burst.key} ${over} ${settled} ${over ? burst.requests.requests : burst.done + burst.shed}`;
    if (box.dataset.state === state) continue;
    box.dataset.state = state;
    box.setAttribute("aria-busy", String(!over)); // announced when it is over, not at every step
    const seconds = ((burst.ended ?? now()) - burst.started).toFixed(1);
    const { p50, p99, max, failed } = burst.requests;
    const lost = burst.raised + burst.refused;
    const sent = ["mails sent", burst.done, false];
    const missing = ["mails lost", lost, lost > 0];
    const slow = ["request p99", ms(p99), p99 > 1000];
    const failures = ["requests failed", failed, failed > 0];
    const age = burst.oldest === null ? "–" : `${burst.oldest.toFixed(1)} s`;
    const figures = ["fresh", "stale"].includes(burst.how)
      ? [sent, ["mails too old", burst.shed, false], ["oldest sent", age, burst.oldest > 1.5 * script.dataset.fresh], slow, failures, missing]
      : [["request p50", ms(p50), false], slow, ["slowest", ms(max), max > 1000], failures, sent, missing];
    const text = document.createElement("p");
    text.textContent = over ? `${burst.asked} at once, finished after ${seconds} s` : `${burst.asked} at once, ${burst.done + lost + burst.shed} done …`;
    const list = document.createElement("dl");
    for (const [term, value, bad] of figures) {
      const pair = document.createElement("div");
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = value;
      dd.classList.toggle("bad", bad);
      pair.append(dt, dd);
      list.append(pair);
    }
    box.replaceChildren(text, list);
  }
}

const canvas = byId("chart");
const pen = canvas.getContext("2d");

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const left = 56, right = width - 10, top = 24, bottom = height - 22;
  const end = now() - 0.6; // the probe reports every quarter of a second
  const x = (time) => right - ((end - time) / WINDOW) * (right - left);
  const y = (latency) => {
    const part = Math.log(Math.min(Math.max(latency, LOWEST), HIGHEST) / LOWEST) / Math.log(HIGHEST / LOWEST);
    return bottom - part * (bottom - top);
  };

  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, sans-serif";
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  for (const level of [1, 10, 100, 1000, 10000]) {
    pen.strokeStyle = colour("line");
    pen.beginPath();
    pen.moveTo(left, Math.round(y(level)) + 0.5);
    pen.lineTo(right, Math.round(y(level)) + 0.5);
    pen.stroke();
    pen.fillStyle = colour("muted");
    pen.textAlign = "right";
    pen.fillText(level >= 1000 ? `${level / 1000} s` : `${level} ms`, left - 6, y(level));
  }
  pen.textAlign = "center";
  for (let ago = 0; ago <= WINDOW; ago += 15) {
    pen.textAlign = ago === 0 ? "right" : "center";
    pen.fillText(ago === 0 ? "now" : `-${ago} s`, x(end - ago), bottom + 13);
  }

  pen.save();
  pen.beginPath();
  pen.rect(left, 0, right - left, bottom + 2);
  pen.clip();
  let labelled = -Infinity;
  for (const burst of bursts) {
    const from = x(burst.started), to = x(Math.min(burst.ended ?? end, end));
    if (to < left) continue;
    pen.fillStyle = colour(burst.how);
    pen.globalAlpha = 0.1;
    pen.fillRect(from, top, Math.max(to - from, 2), bottom - top);
    pen.globalAlpha = 1;
    pen.fillRect(from, top - 14, 2, bottom - top + 14);
    const text = `${burst.asked} × ${burst.label}`, long = pen.measureText(text).width;
    const fits = from + 6 + long <= right; // else the label goes to the left of its line
    const at = fits ? Math.max(from + 6, left + 4) : from - 6 - long;
    if (at < labelled) continue; // the colour says it as well
    pen.textAlign = "left";
    pen.fillText(text, at, top - 9);
    labelled = at + long + 8;
  }
  const paints = Object.fromEntries(NAMES.map((name) => [name, colour(name)]));
  const bad = colour("bad");
  for (const [due, latency, ok] of samples) {
    const px = x(due);
    if (px < left - 4) continue;
    if (ok) {
      const burst = bursts.findLast((each) => each.started <= due && due <= (each.ended ?? Infinity));
      pen.fillStyle = paints[burst ? burst.how : "idle"];
      pen.fillRect(px - 1.25, y(latency) - 1.25, 2.5, 2.5);
    } else {
      pen.strokeStyle = bad;
      pen.lineWidth = 1.6;
      pen.beginPath();
      pen.moveTo(px - 3, y(latency) - 3);
      pen.lineTo(px + 3, y(latency) + 3);
      pen.moveTo(px - 3, y(latency) + 3);
      pen.lineTo(px + 3, y(latency) - 3);
      pen.stroke();
    }
  }
  if (waiting.requests > 5) {
    pen.fillStyle = bad;
    pen.textAlign = "right";
    pen.fillText(`${waiting.requests} without an answer for up to ${ms(waiting.oldest_ms)}`, right - 6, y(waiting.oldest_ms));
  }
  pen.restore();
}

async function ask() {
  try {
    const response = await fetch(`${script.dataset.live}?after=${last}`, { cache: "no-store" });
    if (!response.ok) throw new Error(response.statusText);
    const live = await response.json();
    if (live.last < last) samples = []; // the server was started anew
    last = live.last;
    offset = live.now - Date.now() / 1000;
    samples = samples.concat(live.samples).filter(([due]) => due > now() - WINDOW - 2);
    samples.sort((a, b) => a[0] - b[0]);
    bursts = live.bursts.sort((a, b) => a.started - b.started);
    waiting = live.waiting;
    byId("lost").hidden = true;
    showFigures(live);
    showResults();
    canvas.setAttribute("aria-label", `Request latency over the last minute: p50 ${byId("p50").textContent}, p99 ${byId("p99").textContent}`);
    if (still.matches) draw();
  } catch {
    byId("lost").hidden = false;
  }
  setTimeout(ask, EVERY);
}

for (const form of document.querySelectorAll("main form")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const data = new FormData(form, event.submitter);
    const box = document.querySelector(`.mean[data-how="${data.get("how")}"] .result`);
    try {
      const response = await fetch(form.action, { method: "POST", body: data });
      if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
    } catch (error) {
      box.dataset.state = "";
      box.textContent = `The sign-up itself failed: ${error.message}`;
      box.classList.add("bad");
      setTimeout(() => box.classList.remove("bad"), 3000);
    }
  });
}

function frame() {
  draw();
  if (!still.matches) requestAnimationFrame(frame);
}

ask();
frame();
