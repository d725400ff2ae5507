// The prompt form: all models answer side by side, streaming.

const form = document.getElementById("try");
const answers = [...document.querySelectorAll(".answer[data-model]")];
const stop = document.getElementById("stop");
let running = null;

form?.addEventListener("click", ({ target }) => {
  if (target.dataset.example) form.elements.prompt.value = target.dataset.example;
});
form?.elements.prompt.addEventListener("keydown", (event) => {
  const button = form.querySelector("[type=submit]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !button.disabled) form.requestSubmit(button);
});
// An empty prompt.
form?.elements.prompt.addEventListener("invalid", (event) => {
  event.preventDefault();
  document.getElementById("prompt-problem").textContent = "Write a prompt, or choose an example.";
  event.target.focus();
});
// Whatever is asked next, problems with what was asked before are over.
for (const type of ["input", "submit", "reset", "click"]) {
  form?.addEventListener(type, ({ target }) => {
    if (type === "click" && !target.dataset.example) return;
    document.getElementById("prompt-problem").textContent = "";
    for (const answer of answers.filter(({ classList }) => classList.contains("error"))) settle(answer);
  });
}
stop?.addEventListener("click", () => running?.abort());
form?.addEventListener("reset", () => {
  running?.abort();
  answers.forEach(clear);
});
form?.elements.mode.forEach((mode) => mode.addEventListener("change", () => answers.forEach(clear)));

function clear(answer) {
  answer.messages = [];
  answer.querySelector("output").textContent = "";
  settle(answer);
}

// Nothing is said of an answer any more.
function settle(answer) {
  answer.classList.remove("error");
  answer.querySelector(".figures").textContent = "";
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("[type=submit]");
  running = new AbortController();
  button.disabled = true;
  stop.disabled = false;
  await Promise.all(answers.map((answer) => ask(answer, new FormData(form), running.signal)));
  button.disabled = false;
  stop.disabled = true;
});

async function ask(answer, fields, signal) {
  const output = answer.querySelector("output");
  const note = answer.querySelector(".figures");
  const withoutTemplate = answer.querySelector(".without-template");
  const isChat = fields.get("mode") === "chat" && withoutTemplate.hidden;
  const prompt = fields.get("prompt");
  answer.classList.remove("error");
  answer.setAttribute("aria-busy", "true");
  note.textContent = "Generating …";
  const body = {
    model: answer.dataset.model,
    max_tokens: Number(fields.get("max_tokens")),
    temperature: Number(fields.get("temperature")),
    stream: true,
    stream_options: { include_usage: true },
  };
  let text = output, question;
  if (isChat) {
    body.messages = [...(answer.messages ?? []), { role: "user", content: prompt }];
    question = addTurn(output, "user", prompt);
    text = addTurn(output, "assistant", "");
  } else {
    body.prompt = prompt;
    output.textContent = "";
  }
  const started = performance.now();
  let first, reason, usage;
  try {
    const path = isChat ? "/v1/chat/completions" : "/v1/completions";
    const response = await request("POST", path, body, { signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      first ??= performance.now();
      text.append(choice.text ?? choice.delta?.content ?? "");
      reason = choice.finish_reason ?? reason;
    }
    const seconds = (performance.now() - started) / 1000;
    const tokens = usage?.completion_tokens ?? 0;
    note.textContent = `${counted(tokens, "token")}, ${reason ?? "end"}, ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(1)} tokens/s, first after ${Math.round((first ?? started) - started)} ms`;
  } catch (error) {
    if (error.name === "AbortError") {
      note.textContent = "Stopped.";
    } else if (error.code === "no_chat_template") {
      withoutTemplate.hidden = false;
      output.textContent = "";
      await ask(answer, fields, signal);
    } else {
      answer.classList.add("error");
      note.textContent = error.message;
    }
  } finally {
    // A chat that was cleared meanwhile stays empty, and what was not answered leaves it.
    if (isChat && text.isConnected) {
      if (reason || text.textContent) answer.messages = [...body.messages, { role: "assistant", content: text.textContent }];
      else for (const turn of [question, text]) turn.remove();
    }
    answer.removeAttribute("aria-busy");
  }
}

function addTurn(output, role, content) {
  const turn = document.createElement("span");
  turn.className = `turn ${role}`;
  turn.textContent = content;
  output.append(turn);
  return turn;
}

// The JSON of each server-sent event until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
