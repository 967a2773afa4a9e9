// The page of a gateway. It asks /api/swarm and /api/activity and draws what they say.
// Whatever a peer or a model wrote reaches the document as text (textContent), never as markup.
"use strict";

const EVERY_MS = 2000;
const STALE_S = 15;
const $ = (id) => document.getElementById(id);

const state = { swarm: null, activity: null, names: new Map(), at: 0, model: null, failed: "", turns: [], asking: null, snippet: "curl" };

// --- small helpers ---------------------------------------------------------------------------------------------------

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
  return node;
}

function fill(node, ...children) {
  node.replaceChildren(...children);
}

const short = (peer) => peer.slice(-8);
const called = (peer) => state.names.get(peer) || short(peer);
const whole = (number) => Math.round(number).toLocaleString("en");
const span = (text) => text.split(":").map(Number);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return `${Math.round(value / 60)} min`;
}

function milliseconds(value) {
  return value < 10 ? value.toFixed(1) : value.toFixed(0);
}

function key() {
  return sessionStorage.getItem("llmasos-key") || "";
}

function headers(more = {}) {
  return key() ? { Authorization: `Bearer ${key()}`, ...more } : more;
}

// --- what is known ---------------------------------------------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path, { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(20000) });
  const body = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.error.message), { status: answer.status });
  return body;
}

async function refresh() {
  try {
    const [swarm, activity] = await Promise.all([ask("/api/swarm"), ask("/api/activity")]);
    Object.assign(state, { swarm, activity, at: Date.now(), failed: "" });
    for (const peer of swarm.models.flatMap((one) => one.peers)) state.names.set(peer.peer, peer.name);
    $("login").hidden = true;
  } catch (error) {
    state.failed = error.message;
    if (error.status === 401) $("login").hidden = false;
  }
  draw();
  setTimeout(refresh, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}

function model() {
  const models = state.swarm ? state.swarm.models : [];
  return models.find((one) => one.model === state.model) || models.find((one) => one.covered) || models[0] || null;
}

function coverage(of) {
  const counts = new Array(of.blocks).fill(0);
  for (const peer of of.peers) {
    if (peer.state !== "online") continue;
    const [start, end] = span(peer.blocks);
    for (let block = start; block < Math.min(end, of.blocks); block += 1) counts[block] += 1;
  }
  return counts;
}

// --- drawing ---------------------------------------------------------------------------------------------------------

function draw() {
  drawAge();
  const shown = model();
  drawVerdict(shown);
  if (!state.swarm) return;
  drawModels(shown);
  drawFigures(shown);
  drawMap(shown);
  drawPeers(shown);
  drawRunning();
  drawFailovers();
  drawChart("speed", "tokens_per_s", (value) => value.toFixed(1), "now");
  drawChart("first", "time_to_first_token_s", seconds, "lately", true);
  drawSnippet();
}

function drawAge() {
  const age = state.at ? (Date.now() - state.at) / 1000 : Infinity;
  $("pulse").className = `pulse ${age < STALE_S ? "live" : state.at ? "stale" : ""}`;
  if (!state.at) $("age").textContent = state.failed || "connecting…";
  else if (age < STALE_S) $("age").textContent = `data ${Math.round(age)} s old`;
  else $("age").textContent = `data ${seconds(age)} old: ${state.failed || "no answer"}`;
}

function verdict(tone, headline, emphasis, detail, command) {
  $("verdict").className = `verdict ${tone}`;
  const node = $("headline");
  if (node.dataset.said !== headline + emphasis) {
    node.dataset.said = headline + emphasis;
    fill(node, make("span", "", headline), make("em", "", emphasis));
  }
  $("detail").textContent = detail;
  $("fix").hidden = !command;
  $("fix").querySelector("code").textContent = command || "";
}

// Strangers choose the names of models: one must not become a command by itself. As Python's shlex.quote does it.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);

const join = () => ` --join ${state.activity.join[0] || "MULTIADDR"}`;

function drawVerdict(shown) {
  if (!state.swarm) {
    verdict("", state.failed ? "The gateway does not answer" : "Looking at the swarm…", "", state.failed, "");
    return;
  }
  if (!shown) {
    verdict("bad", "Nobody serves a model here ", "yet", "Start a peer, and it shows up within seconds:",
      `python -m llmasos.peer --blocks auto${join()}`);
    return;
  }
  const counts = coverage(shown);
  const least = Math.min(...counts);
  if (!shown.covered) {
    const gaps = shown.missing.join(", ");
    verdict("bad", `${shown.model} waits: `, `blocks ${gaps} have no peer`, "Serve them, and it is usable again:",
      `python -m llmasos.peer --blocks ${shown.missing[0]} --model ${quoted(shown.model)}${join()}`);
  } else if (least === 1) {
    const alone = counts.filter((count) => count === 1).length;
    verdict("good", `${shown.model} is `, "usable",
      `${alone === counts.length ? "Every block has" : `${plural(alone, "block")} ${alone === 1 ? "has" : "have"}`} a single peer: lose one, and texts wait until another serves its blocks.`, "");
  } else {
    verdict("good", `${shown.model} is `, "usable", `Every block has at least ${least} peers: any one may go without a text noticing.`, "");
  }
}

function drawModels(shown) {
  const names = state.swarm.models.map((one) => one.model);
  $("models").hidden = names.length < 2;
  const select = $("model");
  if ([...select.options].map((option) => option.value).join("\n") !== names.join("\n")) {
    fill(select, ...names.map((name) => Object.assign(make("option", "", name), { value: name })));
  }
  if (shown) select.value = shown.model;
}

function drawFigures(shown) {
  const samples = state.activity.samples;
  const last = samples[samples.length - 1];
  const firsts = samples.filter((one) => one.time_to_first_token_s !== undefined);
  const online = shown ? shown.peers.filter((peer) => peer.state === "online") : [];
  const free = shown && shown.covered ? Math.min(...coverageRoom(shown)) : 0;
  const figures = [
    ["peers online", String(online.length), ""],
    ["weakest block has", shown ? String(Math.min(...coverage(shown))) : "0", shown && Math.min(...coverage(shown)) === 1 ? " peer" : " peers"],
    ["room for", whole(free), " tokens"],
    ["being written", String(state.activity.running.length), state.activity.waiting ? ` + ${state.activity.waiting} waiting` : state.activity.running.length === 1 ? " text" : " texts"],
    ["speed", last ? last.tokens_per_s.toFixed(1) : "0", " tokens/s"],
    ["first token after", firsts.length ? seconds(firsts[firsts.length - 1].time_to_first_token_s) : "–", ""],
  ];
  fill($("figures"), ...figures.map(([name, value, unit]) => make("div", "", make("dt", "", name), make("dd", "", value, make("small", "", unit)))));
}

function coverageRoom(shown) {
  const room = new Array(shown.blocks).fill(0);
  for (const peer of shown.peers) {
    if (peer.state !== "online") continue;
    const [start, end] = span(peer.blocks);
    for (let block = start; block < Math.min(end, shown.blocks); block += 1) room[block] += peer.kv_free_tokens;
  }
  return room;
}

function drawMap(shown) {
  if (!shown) {
    fill($("map"));
    $("weakest").textContent = "";
    return;
  }
  const rows = [];
  for (const peer of shown.peers.slice(0, 60)) {
    const [start, end] = span(peer.blocks);
    const bar = make("div", `bar ${["joining", "draining", "offline"].includes(peer.state) ? peer.state : ""}`, peer.blocks);
    bar.style.left = `${(100 * start) / shown.blocks}%`;
    bar.style.width = `${(100 * (end - start)) / shown.blocks}%`;
    bar.title = `${peer.name || short(peer.peer)}: blocks ${peer.blocks}, ${peer.state}`;
    rows.push(make("div", "who", make("b", "", peer.name || "peer"), make("span", "", short(peer.peer))), make("div", "track", bar));
  }
  const counts = coverage(shown);
  const cells = counts.map((count, block) => {
    const cell = make("span", count === 0 ? "none" : count === 1 ? "one" : "", count);
    cell.title = `block ${block}: ${plural(count, "peer")}`;
    return cell;
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => make("span", "", Math.round(part * shown.blocks)));
  rows.push(make("div", "label", "peers per block"), make("div", "cover", ...cells), make("div", "label", "block"), make("div", "ruler", ...ticks));
  $("map").classList.toggle("roomy", shown.peers.length <= 6);
  $("map").style.gridTemplateColumns = "minmax(84px, 23%) minmax(0, 1fr)";
  fill($("map"), ...rows);
  const least = Math.min(...counts);
  const weak = counts.map((count, block) => (count === least ? block : -1)).filter((block) => block >= 0);
  const more = shown.peers.length > 60 ? ` ${shown.peers.length - 60} more peers are in the table.` : "";
  $("weakest").textContent = `Weakest: ${ranges(weak)} with ${plural(least, "peer")}.${more}`;
}

function ranges(blocks) {
  const found = [];
  for (const block of blocks) {
    const last = found[found.length - 1];
    if (last && last[1] === block) last[1] = block + 1;
    else found.push([block, block + 1]);
  }
  const named = found.slice(0, 6).map(([start, end]) => (end - start === 1 ? `block ${start}` : `blocks ${start}:${end}`));
  return named.join(", ") + (found.length > 6 ? ", …" : "");
}

function drawPeers(shown) {
  const peers = shown ? shown.peers : [];
  $("peer-count").textContent = plural(peers.length, "peer");
  const relayed = new Set(state.activity.relayed);
  const rows = peers.map((peer) => {
    const load = make("td");
    const meter = Object.assign(document.createElement("meter"), { min: 0, max: 1, high: 0.9, value: peer.load });
    load.append(meter, `${Math.round(100 * peer.load)} %`);
    const rtt = state.activity.rtt_s[peer.peer];
    const id = make("td", "id", short(peer.peer));
    id.title = peer.peer;
    const name = make("td", "name", peer.name || "–");
    name.title = peer.name;
    return make("tr", "", id, name, make("td", "blocks", peer.blocks),
      make("td", "", make("span", `state ${["online", "joining", "draining"].includes(peer.state) ? peer.state : ""}`, peer.state)),
      make("td", "num", whole(peer.throughput)), load, make("td", "num", whole(peer.kv_free_tokens)),
      make("td", "", relayed.has(peer.peer) ? "relayed" : "direct"),
      make("td", "num", rtt === undefined ? "–" : rtt < 0.001 ? "< 1 ms" : seconds(rtt)),
      make("td", "", peer.quantization === "none" ? peer.dtype : `${peer.dtype}, ${peer.quantization}`),
      make("td", "num", `${seconds(peer.age_s)} ago`));
  });
  const labels = [...$("peers").tHead.rows[0].cells].map((cell) => cell.textContent);
  for (const row of rows) [...row.cells].forEach((cell, index) => { cell.dataset.label = labels[index]; });
  fill($("peers").tBodies[0], ...rows);
}

// --- live requests and failovers -------------------------------------------------------------------------------------

function hop(one, time, away) {
  const name = make("b", "", called(one.peer));
  const node = make("li", "", make("span", "blocks", one.blocks), name);
  node.title = one.peer;
  if (time) {
    const { queue_ms: queue, compute_ms: compute, network_ms: network } = time;
    node.append(make("span", "ms", `${milliseconds(queue + compute + network)} ms`));
    node.title += `\n${milliseconds(compute)} ms computing, ${milliseconds(queue)} ms waiting, ${milliseconds(network)} ms on the way`;
  } else if (away !== undefined) {
    node.append(make("span", "ms", `${milliseconds(1000 * away)} ms away`));
  }
  return node;
}

function route(hops, times = [], rtts = {}) {
  const took = new Map(times.map((time) => [`${time.peer} ${time.blocks}`, time]));
  return make("ol", "route", ...hops.map((one) => hop(one, took.get(`${one.peer} ${one.blocks}`), rtts[one.peer])));
}

function drawRunning() {
  const { running, waiting } = state.activity;
  $("waiting").textContent = waiting ? `${waiting} waiting` : "";
  const rows = running.map((text) => {
    const facts = [text.model, `${plural(text.tokens, "token")} after ${text.prompt_tokens} of prompt`, `${text.tokens_per_s.toFixed(1)} tokens/s`];
    if (text.failovers) facts.push(plural(text.failovers, "failover"));
    const node = make("li", "", facts.join(" · "));
    if (text.waiting) node.append(make("div", "wrong", text.waiting));
    node.append(text.route.length ? route(text.route, text.hops, state.activity.rtt_s) : make("div", "none", "finding a route"));
    return node;
  });
  fill($("running"), ...(rows.length ? rows : [make("li", "none", "Nothing at the moment. Ask something in the chat, and its route shows here.")]));
}

function drawFailovers() {
  const { failovers, now } = state.activity;
  $("failover-count").textContent = failovers.length ? plural(failovers.length, "failover") : "";
  const rows = failovers.slice(0, 30).map((event) => {
    const lost = event.lost.map((one) => `${one.blocks} on ${called(one.peer)}`).join(", ");
    const node = make("li", "", make("span", "when", `${seconds(now - event.at)} ago`), `${event.model} lost ${lost}`);
    if (event.why) node.append(make("div", "why", event.why));
    node.append(route(event.now));
    return node;
  });
  fill($("failovers"), ...(rows.length ? rows : [make("li", "none", "None. No text had to change its route.")]));
}

const SVG = "http://www.w3.org/2000/svg";

function drawChart(id, field, words, when, sparse = false) {
  const samples = state.activity.samples.filter((one) => one[field] !== undefined);
  const svg = $(id);
  const most = Math.max(...samples.map((one) => one[field]), 1e-9);
  const last = samples.length ? samples[samples.length - 1][field] : 0;
  $(`${id}-now`).textContent = samples.length ? `${words(last)} ${when}, at most ${words(most)}` : "no samples yet";
  const top = most * 1.12;
  const end = state.activity.now;
  const begin = Math.min(state.activity.samples.length ? state.activity.samples[0].at : end, end - 300);
  $(`${id}-from`).textContent = `${seconds(end - begin)} ago`;
  const points = samples.map((one) => [(600 * (one.at - begin)) / (end - begin), 120 - (116 * one[field]) / top]);
  const line = points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const node = (tag, attributes) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const parts = [node("line", { x1: 0, x2: 600, y1: 120, y2: 120 })];
  if (sparse) {
    for (const [x, y] of points) parts.push(node("path", { class: "dot", d: `M${x} ${y}h.01` }));
  } else if (points.length > 1) {
    parts.push(node("path", { class: "area", d: `${line}L${points[points.length - 1][0]} 120L${points[0][0]} 120Z` }), node("path", { d: line }));
  }
  svg.replaceChildren(...parts);
}

// --- chat ------------------------------------------------------------------------------------------------------------

async function send(question) {
  const shown = model();
  if (!shown) return;
  state.turns.push({ role: "user", content: question });
  const talk = $("talk");
  talk.querySelector(".empty")?.remove();
  const answer = make("div", "it writing");
  talk.append(make("div", "me", question), answer);
  talk.scrollTop = talk.scrollHeight;
  state.asking = new AbortController();
  $("send").textContent = "Stop";
  const begin = performance.now();
  let text = "";
  let first = 0;
  let usage = null;
  try {
    const body = { model: shown.model, messages: state.turns, stream: true, stream_options: { include_usage: true }, temperature: 0.7 };
    for await (const chunk of events(body, state.asking.signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      const piece = chunk.choices.length ? chunk.choices[0].delta.content : "";
      if (!piece) continue;
      first = first || performance.now();
      const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
      text += piece;
      answer.append(piece);
      if (atEnd) talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") talk.append(make("div", "wrong", error.message));
  }
  answer.classList.remove("writing");
  if (text) state.turns.push({ role: "assistant", content: text });
  else {
    state.turns.pop();
    answer.remove();
  }
  if (usage && first) {
    const rate = ((usage.completion_tokens - 1) / (performance.now() - first)) * 1000;
    talk.append(make("div", "said", `${plural(usage.completion_tokens, "token")}, ${rate.toFixed(1)} tokens/s, first after ${seconds((first - begin) / 1000)}`));
  }
  talk.scrollTop = talk.scrollHeight;
  state.asking = null;
  $("send").textContent = "Send";
}

async function* events(body, signal) {
  const answer = await fetch("/v1/chat/completions", { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

// --- snippets --------------------------------------------------------------------------------------------------------

function drawSnippet() {
  const name = JSON.stringify(model() ? model().model : "smollm2");
  const base = location.origin;
  const secret = state.failed || key() ? "YOUR_KEY" : "none";
  const auth = key() ? ` \\\n  -H 'Authorization: Bearer ${secret}'` : "";
  const snippets = {
    curl: `curl ${base}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${auth} \\\n  -d ${quoted(`{"model": ${name}, "messages": [{"role": "user", "content": "Hello!"}], "stream": true}`)}`,
    openai: `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}/v1", api_key="${secret}")\nanswer = client.chat.completions.create(\n    model=${name},\n    messages=[{"role": "user", "content": "Hello!"}],\n)\nprint(answer.choices[0].message.content)`,
    langchain: `from langchain_openai import ChatOpenAI\n\nmodel = ChatOpenAI(base_url="${base}/v1", api_key="${secret}", model=${name})\nprint(model.invoke("Hello!").content)`,
    llmasos: `from llmasos import LLMasOS\n\nwith LLMasOS(endpoint="${base}") as client:\n    print(client.generate_text(prompt="The world is", model_name=${name}, max_length=100))`,
  };
  if ($("snippet").textContent !== snippets[state.snippet]) $("snippet").textContent = snippets[state.snippet];
}

// --- what people do --------------------------------------------------------------------------------------------------

$("model").addEventListener("change", (event) => { state.model = event.target.value; draw(); });
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.asking) { state.asking.abort(); return; }
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  $("question").style.height = "";
  send(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("question").addEventListener("input", (event) => {
  event.target.style.height = "auto";
  event.target.style.height = `${event.target.scrollHeight + 2}px`;
});
$("clear").addEventListener("click", () => {
  state.asking?.abort();
  state.turns = [];
  fill($("talk"), make("p", "empty", "Ask something. The answer is written by the peers on this page, token by token."));
});
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("llmasos-key", $("key").value.trim());
  $("key").value = "";
  location.reload();
});
for (const tab of document.querySelectorAll("[data-snippet]")) {
  tab.addEventListener("click", () => {
    state.snippet = tab.dataset.snippet;
    for (const other of document.querySelectorAll("[data-snippet]")) other.setAttribute("aria-selected", String(other === tab));
    drawSnippet();
  });
}
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code, pre").textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
setInterval(drawAge, 1000);
refresh();
