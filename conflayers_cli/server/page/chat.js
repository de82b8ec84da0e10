"use strict";

const at = (id) => document.getElementById(id);
const messages = [];
let running = null;

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function show(role, text = "") {
  const article = document.createElement("article");
  article.className = role;
  article.textContent = text;
  at("chat").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

/** Appends tokens to an article, each in the colour of who drafted it. */
function paint(article, drafts, counts) {
  const chat = at("chat");
  const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
  for (const { text, by } of drafts) {
    counts.tokens += 1;
    counts[by] = (counts[by] || 0) + 1;
    if (!text) continue;
    const span = document.createElement("span");
    span.className = by;
    span.title = by === "model" ? "decided by the model itself" : `drafted by ${by}, accepted`;
    span.textContent = text;
    article.append(span);
  }
  if (atEnd) chat.scrollTop = chat.scrollHeight;
}

function figures(counts, usage) {
  const seconds = (performance.now() - counts.first) / 1000;
  const speed = counts.tokens > 1 && seconds > 0 ? ((counts.tokens - 1) / seconds).toFixed(1) : "–";
  const parts = [`${counts.tokens} tokens`, `${speed} tokens/s`];
  if (usage) {
    const found = usage.completion_tokens_details;
    const drafted = found.accepted_prediction_tokens + found.rejected_prediction_tokens;
    if (drafted) {
      const rate = (100 * found.accepted_prediction_tokens / drafted).toFixed(0);
      parts.push(`${found.accepted_prediction_tokens} of ${drafted} drafted tokens accepted (${rate} %)`);
    }
  } else {
    const drafted = counts.tokens - (counts.model || 0);
    if (counts.tokens) parts.push(`${(100 * drafted / counts.tokens).toFixed(0)} % of the tokens drafted`);
  }
  at("figures").textContent = parts.join(" · ");
}

/** Calls `take` with every document of a stream of events; resolves at its end. */
async function readEvents(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") take(JSON.parse(event.slice(6)));
    }
  }
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function answer() {
  const system = at("system").value;
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("max").value) || null,
    stream: true, stream_options: { include_usage: true }, show_drafts: true,
  };
  const article = show("assistant");
  const counts = { tokens: 0, first: performance.now() };
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    await readEvents(response, (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        if (!choice.drafts) continue;
        if (!counts.tokens) counts.first = performance.now();
        paint(article, choice.drafts, counts);
      }
      figures(counts, chunk.usage);
    });
  } catch (error) {
    if (error.name !== "AbortError") show("failed", String(error.message || error));
  }
  messages.push({ role: "assistant", content: article.textContent });
  running = null;
  at("send").hidden = false;
  at("stop").hidden = true;
  at("message").focus();
}

function send(event) {
  event.preventDefault();
  const text = at("message").value;
  if (running || !text.trim()) return;
  at("message").value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  answer();
}

function stop() {
  if (running) running.abort();
}

function clear() {
  stop();
  messages.length = 0;
  at("chat").replaceChildren();
  at("message").focus();
}

async function name() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.ok) at("model").textContent = (await response.json()).data[0].id;
}

at("form").addEventListener("submit", send);
at("stop").addEventListener("click", stop);
at("clear").addEventListener("click", clear);
at("key").addEventListener("change", name);
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
name();
