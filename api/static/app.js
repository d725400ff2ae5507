// What every page needs: requests to the api by forms and buttons, copying, tabs, relative times,
// the choice of deltas to compare, and the notice that the server does not answer. htmx refreshes
// what changes by itself.

const csrfToken = document.querySelector("meta[name=csrf-token]").content;
const offline = document.getElementById("offline");
const said = document.getElementById("said");

// The answer's JSON (null without one). Throws an Error with the problem's detail.
async function request(method, path, body, options = {}) {
  const headers = { "X-CSRF-Token": csrfToken };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body), ...options,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("Deltadock does not answer. Try again.");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const problem = await response.json().catch(() => ({}));
  const message = problem.detail ?? problem.error?.message ?? `The server answered ${response.status}.`;
  const text = typeof message === "string" ? message : JSON.stringify(message);
  const error = new Error(text.replace(/GET \/v1\/(\w+)(?:[/?][\w?=&%/-]*)?/g, (route, kind) => (
    ["bases", "jobs", "keys", "nodes"].includes(kind) ? `the page ${kind[0].toUpperCase()}${kind.slice(1)}`
      : ["deltas", "models", "registry"].includes(kind) ? "the page Deltas" : route
  )));
  error.code = problem.code ?? problem.error?.code;
  return error;
}

async function call(method, path, body) {
  const response = await request(method, path, body);
  return response.status === 204 ? null : response.json();
}

function say(text) {
  said.textContent = text;
  said.hidden = false;
}

// Forms and buttons with data-api="METHOD /path/{field}": fields go into the path or the JSON body.
// data-then: reload (the default), stay, show (the new key), or a page to go to.
function bodyOf(form, path) {
  const body = {};
  for (const field of form.elements) {
    const { name, type, value } = field;
    if (!name || type === "submit" || path.includes(`{${name}}`)) continue;
    if (type === "checkbox") {
      body[name] ??= [];
      if (field.checked) body[name].push(value);
    } else if (field.dataset.type === "words") {
      body[name] = value.split(/\s+/).filter(Boolean);
    } else if (value === "") {
      if ("empty" in field.dataset) body[name] = field.dataset.empty === "null" ? null : "";
    } else {
      body[name] = type === "number" || field.dataset.type === "number" ? Number(value) : value;
    }
  }
  return form.dataset.wrap ? { [form.dataset.wrap]: body } : body;
}

async function send(element) {
  const [method, template] = element.dataset.api.split(" ");
  const { confirm: question, then = "reload", said: message } = element.dataset;
  if (question && !confirm(question)) return;
  const isForm = element.tagName === "FORM";
  const path = template.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(element.elements[name].value));
  const fixed = element.dataset.body && JSON.parse(element.dataset.body);
  const output = isForm && element.querySelector("output.problem");
  const button = isForm ? element.querySelector("[type=submit]") : element;
  if (output) output.textContent = "";
  button.disabled = true;
  try {
    const result = await call(method, path, isForm ? bodyOf(element, template) : fixed);
    if (then === "reload") return location.reload();
    if (then.startsWith("/")) return location.assign(then);
    if (then === "show") {
      showKey(result.key);
      if (isForm) element.reset();
      document.body.dispatchEvent(new CustomEvent("key-shown"));  // so that the table has it
    }
    if (message) say(message);
  } catch (error) {
    if (output) output.textContent = error.message;
    else say(error.message);
  }
  button.disabled = false;
}

function showKey(key) {
  said.textContent = "The new key, shown only now: ";
  const code = document.createElement("code");
  code.textContent = key;
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "copy";
  copy.dataset.copy = key;
  copy.textContent = "copy";
  said.append(code, copy);
  said.hidden = false;
  said.scrollIntoView();
}

document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-api]")) return;
  event.preventDefault();
  send(event.target);
});

document.addEventListener("click", ({ target }) => {
  const button = target.closest("button[data-api]");
  if (button) send(button);
  const copy = target.closest("[data-copy]");
  if (copy) copyFrom(copy);
  const tab = target.closest("[role=tab]");
  if (tab) choose(tab);
});

async function copyFrom(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
  } catch {
    // The clipboard API needs HTTPS: show and select the whole value instead.
    const code = button.previousElementSibling;
    code.textContent = button.dataset.copy;
    getSelection().selectAllChildren(code);
    button.textContent = "select";
  }
  setTimeout(() => { button.textContent = "copy"; }, 2000);
}

function choose(tab) {
  for (const other of tab.parentElement.children) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  tab.focus();
}

document.addEventListener("keydown", (event) => {
  const tab = event.target.closest?.("[role=tab]");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!tab || !step) return;
  const tabs = [...tab.parentElement.children];
  choose(tabs.at((tabs.indexOf(tab) + step) % tabs.length));
});

// Two to four deltas can be compared.
document.addEventListener("change", ({ target }) => {
  if (target.getAttribute("form") !== "compare") return;
  const form = document.getElementById("compare");
  const count = document.querySelectorAll("input[form=compare]:checked").length;
  form.querySelector("button").disabled = count < 2 || count > 4;
  form.querySelector("[role=status]").textContent =
    count === 0 ? "Choose two to four deltas" : `${count} chosen${count === 1 ? ", one more at least" : count > 4 ? ", four at most" : ""}`;
});

// The next four write as `deltadock.words` does; none writes what needs an exponent.
const significant = (value) => (value < 999.5 ? value.toPrecision(3) : value.toFixed(0));
const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function size(bytes) {
  let power = 0;
  for (; bytes >= 999.5 && power < 5; power++) bytes /= 1000;
  return `${power ? significant(bytes) : bytes} ${["B", "kB", "MB", "GB", "TB", "PB"][power]}`;
}

// For pages that stay open.
function ago(time) {
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  if (Math.abs(seconds) < 45) return "just now";
  for (const [unit, length, upTo] of [["min", 60, 60], ["h", 3600, 24], ["day", 86400, 14]]) {
    const count = Math.max(1, Math.round(Math.abs(seconds) / length));
    const text = unit === "day" ? counted(count, unit) : `${count} ${unit}`;
    if (count < upTo) return seconds > 0 ? `${text} ago` : `in ${text}`;
  }
  return new Date(time).toISOString().slice(0, 10);
}

setInterval(() => {
  for (const time of document.querySelectorAll("time:not(.log time)")) time.textContent = ago(time.dateTime);
}, 30000);

if (location.hash === "#log") document.getElementById("log")?.setAttribute("open", "");

// A log shows its newest line, unless the reader has scrolled up.
let atNewest = true;
document.addEventListener("scroll", ({ target }) => {
  if (target.matches?.(".log")) atNewest = target.scrollHeight - target.scrollTop - target.clientHeight < 8;
}, true);
document.addEventListener("htmx:after:swap", () => {
  const log = document.querySelector(".log");
  if (log && atNewest) log.scrollTop = log.scrollHeight;
});

document.addEventListener("htmx:error", () => { offline.hidden = false; });
document.addEventListener("htmx:after:request", ({ detail }) => {
  offline.hidden = (detail.ctx.response?.status ?? 0) < 500;
});
