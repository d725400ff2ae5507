// Copy buttons, the prompt form and the offline notice. htmx refreshes the progress.

document.addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-copy]");
  if (!button) return;
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
});

const csrfToken = document.querySelector("meta[name=csrf-token]").content;

const offline = document.getElementById("offline");
document.addEventListener("htmx:error", () => { offline.hidden = false; });
document.addEventListener("htmx:after:request", ({ detail }) => {
  const status = detail.ctx.response?.status ?? 0;
  offline.hidden = status < 500;
  if (status < 400 && detail.ctx.sourceElement?.matches("[data-reload]")) location.reload();
});

const form = document.getElementById("try");
form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const fields = new FormData(form);
  const body = JSON.stringify({
    prompt: fields.get("prompt"),
    max_tokens: Number(fields.get("max_tokens")),
    temperature: Number(fields.get("temperature")),
  });
  const button = form.querySelector("button");
  button.disabled = true;
  await Promise.all([...document.querySelectorAll(".answer")].map((answer) => ask(answer, body)));
  button.disabled = false;
});

async function ask(answer, body) {
  const output = answer.querySelector("output");
  const note = answer.querySelector("p");
  const started = performance.now();
  answer.classList.remove("error");
  answer.setAttribute("aria-busy", "true");
  output.textContent = "";
  note.textContent = "Generating …";
  try {
    const response = await fetch(answer.dataset.generate, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": csrfToken },
      body,
    });
    const result = await response.json();
    if (!response.ok) throw new Error(`${result.detail} (${result.code})`);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    output.textContent = result.text;
    note.textContent = `${result.usage.completion_tokens} tokens, ${result.finish_reason}, ${seconds} s`;
  } catch (error) {
    answer.classList.add("error");
    note.textContent = error.message;
  } finally {
    answer.removeAttribute("aria-busy");
  }
}
