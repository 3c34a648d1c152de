// Everything that the server sends is shown as text, never as HTML.
"use strict";

const SOME = 0.2; // of the heads: a dotted line under the sentence
const OFTEN = 0.5; // a full line
const LISTED = 3; // of the most recalled sentences
const SHORTEST = 0.1; // seconds: less than that says nothing about the speed
const GRAPH = { left: 76, right: 10, top: 14, bottom: 34, width: 480, height: 260 };
const LINES = [["full", "full_bytes"], ["host", "all_bytes"], ["device", "device_bytes"]];

const element = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const percent = (share) => `${number(100 * share)}%`;

let running = null; // the AbortController of the request that is being answered
let model = "";

function bytes(value) {
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${number(value / size, 2)} ${unit}`;
  }
  return `${number(value)} B`;
}

// ---- the server

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = element("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  const options = { headers, signal, cache: "no-store", credentials: "omit" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  if (answer.status === 401) element("key-field").hidden = false;
  const sent = await answer.json().catch(() => null);
  throw new Error(sent?.error?.message ?? `the server answers with status ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server closed the connection before the text was complete");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function findModel() {
  const answer = await (await ask("v1/models")).json();
  model = answer.data[0].id;
  element("model").textContent = model;
  document.title = `${model} – sentcompress`;
}

function request() {
  const body = {
    model,
    temperature: Number(element("temperature").value),
    max_tokens: Number(element("tokens").value),
    stream: true,
    stream_options: { include_cache: true },
  };
  const prompt = element("prompt").value;
  return element("chat").checked
    ? ["v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }]
    : ["v1/completions", { ...body, prompt }];
}

// ---- one answer

class Answer {
  // Places count characters of Unicode, as the server does; those of JavaScript's strings can be halves of them.
  constructor() {
    this.characters = [];
    this.promptLength = this.newest = 0;
    this.points = []; // the field "cache" of each chunk
    this.began = null; // when the prompt was read
    this.ended = false;
    this.sums = new Map(); // recalled sentences: their places, and their shares added up
  }

  add(choice) {
    const cache = choice.cache;
    if (cache.prompt !== undefined) {
      this.characters = Array.from(cache.prompt);
      this.promptLength = this.characters.length;
      this.began = performance.now();
    }
    const text = choice.text ?? choice.delta?.content ?? "";
    if (text) {
      this.newest = this.characters.length;
      for (const character of text) this.characters.push(character);
    }
    this.points.push({ ...cache, all_bytes: cache.device_bytes + cache.host_bytes });
    this.seconds = (performance.now() - this.began) / 1000;
    for (const [start, end, share] of cache.recalled) {
      const known = this.sums.get(start) ?? { start, end, share: 0 };
      known.share += share;
      this.sums.set(start, known);
    }
  }

  get last() {
    return this.points[this.points.length - 1];
  }

  // While it writes: what the latest token recalled. Afterwards: the mean over all new tokens.
  get recalled() {
    const steps = Math.max(1, this.points.filter((point) => point.recalled.length).length);
    const found = this.ended
      ? [...this.sums.values()].map((known) => ({ ...known, share: known.share / steps }))
      : this.last.recalled.map(([start, end, share]) => ({ start, end, share }));
    return found.map((each) => this.trimmed(each)).sort((a, b) => a.start - b.start);
  }

  trimmed({ start, end, share }) {
    while (start < end && !this.characters[start].trim()) start += 1;
    while (end > start && !this.characters[end - 1].trim()) end -= 1;
    return { start, end, share };
  }

  part(start, end) {
    return this.characters.slice(start, end).join("");
  }
}

// ---- showing it

function showText(answer, recalled) {
  const marks = new Map(recalled.map((each) => [each.start, each]));
  const places = new Set([0, answer.promptLength, answer.newest, answer.characters.length]);
  for (const { start, end } of recalled) places.add(start).add(end);
  const sorted = [...places].sort((a, b) => a - b);
  const box = element("text");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  const nodes = [];
  let mark = null;
  for (let i = 0; i + 1 < sorted.length; i += 1) {
    const [start, end] = [sorted[i], sorted[i + 1]];
    if (marks.has(start)) mark = marks.get(start);
    const marked = mark !== null && start >= mark.start && end <= mark.end;
    const node = document.createElement(marked ? "mark" : "span");
    node.textContent = answer.part(start, end);
    if (start < answer.promptLength) node.classList.add("prompt");
    else if (start >= answer.newest && !answer.ended) node.classList.add("newest");
    if (marked) {
      node.dataset.start = start;
      node.style.setProperty("--share", mark.share.toFixed(3));
      node.title = `recalled by ${percent(mark.share)} of the heads`;
      if (mark.share >= SOME) node.classList.add(mark.share >= OFTEN ? "often" : "some");
    }
    nodes.push(node);
  }
  box.replaceChildren(...nodes);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showRecalled(answer, recalled) {
  const legend = element("legend");
  const list = element("recalled");
  legend.hidden = list.hidden = recalled.length === 0;
  if (legend.hidden) return;
  const what = answer.ended ? "for the new tokens, on average" : "for the latest token";
  legend.textContent =
    `Marked: ${number(recalled.length)} older sentences recalled ${what}. The stronger the mark, the more of the ` +
    `heads recall it: a dotted line from ${percent(SOME)} on, a full one from ${percent(OFTEN)}. Most recalled:`;
  const most = [...recalled].sort((a, b) => b.share - a.share).slice(0, LISTED);
  list.replaceChildren(
    ...most.map(({ start, end, share }) => {
      const item = document.createElement("li");
      // While it writes, the list changes with each token: nothing to press, and no focus to lose.
      const content = document.createElement(answer.ended ? "button" : "span");
      content.textContent = answer.part(start, end);
      content.type = "button";
      content.addEventListener("click", () => {
        element("text").querySelector(`[data-start="${start}"]`).scrollIntoView({ block: "center" });
      });
      item.append(`${percent(share)}: `, content);
      return item;
    }),
  );
}

function showFigures(answer) {
  const { prompt_tokens, completion_tokens, device_bytes, all_bytes, full_bytes } = answer.last;
  element("count").textContent = `${number(prompt_tokens)} + ${number(completion_tokens)}`;
  element("rate").textContent =
    completion_tokens && answer.seconds > SHORTEST ? number(completion_tokens / answer.seconds, 1) : "–";
  element("device").textContent = bytes(device_bytes);
  element("host").textContent = bytes(all_bytes);
  element("full").textContent = bytes(full_bytes);
  element("share").textContent = full_bytes ? percent(device_bytes / full_bytes) : "–";
}

function svg(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function showGraph(answer) {
  const { left, right, top, bottom, width, height } = GRAPH;
  const most = Math.max(1, ...answer.points.map((point) => Math.max(point.full_bytes, point.all_bytes)));
  const longest = Math.max(1, answer.last.completion_tokens);
  const x = (tokens) => left + ((width - left - right) * tokens) / longest;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
  const nodes = [svg("path", { class: "axis", d: `M${left} ${top}V${y(0)}H${width - right}` })];
  for (const value of [0, most / 2, most]) {
    nodes.push(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, bytes(value)));
  }
  const under = height - bottom + 20;
  nodes.push(svg("text", { x: left, y: under }, "0"));
  nodes.push(svg("text", { x: (left + width) / 2, y: under, "text-anchor": "middle" }, "new tokens"));
  nodes.push(svg("text", { x: width - right, y: under, "text-anchor": "end" }, number(longest)));
  for (const [name, field] of LINES) {
    const places = answer.points.map((p) => `${x(p.completion_tokens).toFixed(1)} ${y(p[field]).toFixed(1)}`);
    nodes.push(svg("path", { class: `curve ${name}`, d: `M${places.join("L")}` }));
  }
  const { device_bytes, all_bytes, full_bytes } = answer.last;
  const graph = element("graph");
  graph.setAttribute(
    "aria-label",
    `Bytes of the cache by new tokens; after ${number(longest)}: ${bytes(device_bytes)} on the device, ` +
      `${bytes(all_bytes)} with slow storage, ${bytes(full_bytes)} in a full cache`,
  );
  graph.replaceChildren(...nodes);
}

function show(answer) {
  const recalled = answer.recalled;
  showText(answer, recalled);
  showRecalled(answer, recalled);
  showFigures(answer);
  showGraph(answer);
}

// ---- what a person does

async function write() {
  element("error").textContent = "";
  element("status").textContent = "Reading the prompt";
  element("write").disabled = true;
  element("stop").disabled = false;
  running = new AbortController();
  const answer = new Answer();
  let frame = 0;
  let reason = "";
  const ends = { length: "as many tokens as allowed", stop: "the model ended the text" };
  try {
    if (!model) await findModel();
    const [path, body] = request();
    for await (const chunk of events(await ask(path, body, running.signal))) {
      answer.add(chunk.choices[0]);
      reason = chunk.choices[0].finish_reason ?? reason;
      element("status").textContent = "Writing";
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        show(answer);
      });
    }
    element("status").textContent = `Done: ${ends[reason] ?? reason}`;
  } catch (error) {
    element("status").textContent = error.name === "AbortError" ? "Stopped" : "";
    if (error.name !== "AbortError") element("error").textContent = error.message;
  } finally {
    cancelAnimationFrame(frame);
    answer.ended = true;
    if (answer.points.length) show(answer);
    running = null;
    element("write").disabled = false;
    element("stop").disabled = true;
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) write();
});
element("stop").addEventListener("click", () => running?.abort());
findModel().catch((error) => {
  // Without a key, the field for it says what is missing.
  if (element("key-field").hidden) element("error").textContent = error.message;
});
