// Uploads from the browser, and the forms that need them. Files are hashed in a worker, announced,
// and sent in parallel; what the server has is not sent again, so that choosing the same files
// again continues an upload that was interrupted.

const PARALLEL = 3;
const TRIES = 4;
const workerUrl = document.querySelector("script[data-worker]").dataset.worker;

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// SHA-256 of each file, in one worker after another.
function hash(file, progress) {
  return new Promise((resolve, reject) => {
    const worker = new Worker(workerUrl, { type: "module" });
    worker.addEventListener("message", ({ data }) => {
      if (data.done) return progress(data.done);
      worker.terminate();
      if (data.hex) resolve(data.hex);
      else reject(new Error(data.error));
    });
    worker.addEventListener("error", () => reject(new Error(`${file.name} cannot be hashed.`)));
    worker.postMessage(file);
  });
}

// PUT with progress, which fetch does not tell; tried again while the connection or server fails.
async function put(path, blob, progress) {
  for (let attempt = 1; ; attempt++) {
    const { status, body } = await new Promise((resolve) => {
      const sending = new XMLHttpRequest();
      sending.open("PUT", path);
      sending.setRequestHeader("X-CSRF-Token", csrfToken);
      sending.upload.addEventListener("progress", ({ loaded }) => progress(loaded));
      sending.addEventListener("loadend", () => resolve({ status: sending.status, body: sending.responseText }));
      sending.send(blob);
    });
    if (status >= 200 && status < 300) return progress(blob.size);
    progress(0);
    if ((status > 0 && status < 500 && status !== 429) || attempt === TRIES) {
      throw await problemOf(new Response(body, { status: status || 503 }));
    }
    await pause(2 ** attempt / 2);
  }
}

async function inParallel(tasks) {
  const queue = [...tasks];
  await Promise.all(Array.from({ length: PARALLEL }, async () => {
    while (queue.length) await queue.shift()();
  }));
}

// The open upload of exactly these files, or a new one, for the delta of this name if there is one.
async function openUpload(kind, files, delta) {
  const key = (list) => JSON.stringify(list.map(({ path, sha256 }) => [path, sha256]).sort());
  const wanted = key(files);
  const { data } = await call("GET", "/v1/uploads?state=open&limit=100");
  const found = data.find((upload) => upload.kind === kind && key(upload.files) === wanted);
  return found ?? call("POST", "/v1/uploads", { kind, files, delta });
}

// Sends the files; returns the completed upload.
async function upload(kind, chosen, delta, report) {
  const total = chosen.reduce((sum, { file }) => sum + file.size, 0);
  const announced = [];
  let before = 0;
  for (const { path, file } of chosen) {
    const sha256 = await hash(file, (done) => report("Hashing", before + done, total));
    announced.push({ path, size: file.size, sha256 });
    before += file.size;
  }
  let state = await openUpload(kind, announced, delta);
  const sent = new Map();
  const progress = (key) => (bytes) => {
    sent.set(key, bytes);
    report("Sending", [...sent.values()].reduce((sum, value) => sum + value, 0), total);
  };
  const byPath = new Map(chosen.map(({ path, file }) => [path, file]));
  const tasks = [];
  for (const { path, stored, parts, size: bytes } of state.files) {
    const file = byPath.get(path);
    const route = `/v1/uploads/${state.id}/files/${path.split("/").map(encodeURIComponent).join("/")}`;
    if (stored) progress(path)(bytes);
    else if (!parts) tasks.push(() => put(route, file, progress(path)));
    else {
      const { arrived } = await call("GET", `${route}/parts?limit=1`);
      const here = new Set(arrived);
      for (let number = 1; number <= parts.count; number++) {
        const piece = file.slice((number - 1) * parts.bytes, number * parts.bytes);
        if (here.has(number)) progress(`${path}:${number}`)(piece.size);
        else tasks.push(() => put(`${route}/parts/${number}`, piece, progress(`${path}:${number}`)));
      }
    }
  }
  await inParallel(tasks);
  state = await call("POST", `/v1/uploads/${state.id}/complete`);
  while (state.state === "completing") {
    report(state.error ? `${state.error.message} Trying again` : "Checking", (state.percent ?? 0) / 100, 1);
    await pause(1);
    state = await call("GET", `/v1/uploads/${state.id}`);
  }
  if (state.error) throw new Error(state.error.message);
  return state;
}

// The files of the folder itself that the api takes.
function filesOf(input, suffixes) {
  return [...input.files]
    .filter((file) => file.webkitRelativePath.split("/").length <= 2)
    .filter((file) => !file.name.startsWith(".") && suffixes.some((suffix) => file.name.endsWith(suffix)))
    .map((file) => ({ path: file.name, file }));
}

// What to choose instead of a folder whose own files hold no weights; null where nothing tells.
function insteadOf(input) {
  const paths = [...input.files].map((file) => file.webkitRelativePath.split("/").slice(1));
  const own = paths.filter((path) => path.length === 1).map(([name]) => name);
  const isWeights = (name) => name.endsWith(".safetensors");
  if (own.some(isWeights)) return null;
  const inner = new Set(paths.filter(([, name]) => name && isWeights(name)).map(([folder]) => folder));
  if (inner.size) return `The weights are in inner folders (${[...inner].sort().slice(0, 4).join(", ")}). Choose one of these.`;
  if (!own.some((name) => /\.(bin|pt|pth|pkl|pickle|ckpt)$/.test(name))) return null;
  return "The weights are only PyTorch pickles, which can run code when opened. Save the model as .safetensors: model.save_pretrained(FOLDER).";
}

// One `.upload` block; `done` is called with the checkpoint or text, or with null while there is
// none. `delta` tells, of the files chosen, the name of the delta that they will become.
function watch(block, done, delta = () => null) {
  const input = block.querySelector("input");
  const bar = block.querySelector("progress");
  const note = block.querySelector("p");
  let round = 0;
  input.addEventListener("change", async () => {
    const own = ++round;
    const kind = block.dataset.upload;
    const suffixes = block.dataset.suffixes.split(" ");
    const files = filesOf(input, suffixes);
    done(null);
    note.classList.remove("problem");
    const instead = kind === "checkpoint" && insteadOf(input);
    if (instead) {
      bar.hidden = true;
      note.classList.add("problem");
      note.textContent = instead;
      input.value = "";
      return;
    }
    if (!files.length) {
      note.textContent = input.files.length ? `None of these is ${suffixes.join(", ")}.` : "";
      return;
    }
    bar.hidden = false;
    try {
      const report = (what, bytes, total) => {
        if (own !== round) throw new Error("Other files were chosen.");
        bar.value = total ? bytes / total : 1;
        note.textContent = total > 1 ? `${what}: ${size(bytes)} of ${size(total)}` : `${what} …`;
      };
      const state = await upload(kind, files, delta(input.files), report);
      if (own !== round) return;
      const found = state.checkpoint ?? state.calibration;
      bar.value = 1;
      note.textContent = `Here and checked: ${counted(files.length, "file")}, ${found.digest.slice(0, 12)}…`;
      done(found);
    } catch (error) {
      if (own !== round) return;
      bar.hidden = true;
      note.classList.add("problem");
      note.textContent = `${error.message} Choose the files again to go on.`;
      input.value = "";
    }
  });
}

const register = document.getElementById("register");
if (register) {
  let digest = null;
  const button = register.querySelector("[type=submit]");
  watch(document.getElementById("base-files"), (checkpoint) => {
    digest = checkpoint?.digest;
    button.disabled = !digest;
  });
  register.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const base = await call("POST", "/v1/bases", { name: register.elements.name.value, checkpoint: digest });
      location.assign(`/bases/${encodeURIComponent(base.name)}`);
    } catch (error) {
      register.querySelector("output.problem").textContent = error.message;
    }
  });
}

const form = document.getElementById("new");
if (form) {
  const fields = form.elements;
  const button = form.querySelector("[type=submit]");
  const output = form.querySelector("output.problem");
  const shown = document.getElementById("preview");
  let tuned = null, text = null, timer = 0, asked = 0;

  // An adapter has one method, which the api takes if none is named.
  const isAdapter = () => tuned?.model_type === "peft-adapter";
  const method = () => (isAdapter() ? {} : { method: fields.method.value });
  const takesGoal = () => !isAdapter() && fields.method.selectedOptions[0].dataset.max !== "";
  const goal = () => (takesGoal() ? { [fields.goal.value]: Number(fields.value.value) } : {});
  const rows = (pairs) => shown.replaceChildren(...pairs.flatMap(([term, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = term;
    dd.textContent = value;
    return [dt, dd];
  }));

  async function preview() {
    fields.method.disabled = isAdapter();
    document.getElementById("method-said").textContent = isAdapter()
      ? "A PEFT adapter: imported as it is, without loss." : fields.method.selectedOptions[0].dataset.said;
    form.querySelector(".goal").hidden = !takesGoal();
    if (!tuned) return;
    const own = ++asked;
    output.textContent = "";
    // Which size keeps a bound is found while compressing; it is at most that of the most bits.
    const isBound = takesGoal() && ["max_kl", "min_agreement"].includes(fields.goal.value);
    const most = { bits: Number(fields.method.selectedOptions[0].dataset.max) };
    try {
      const found = await call("POST", "/v1/previews", {
        base: fields.base.value, checkpoint: tuned.digest, ...method(), ...(isBound ? most : goal()),
      });
      if (own !== asked) return;
      rows(isBound ? [
        ["Artifact", "the smallest that keeps the bound, found while compressing"],
        ["at most", size(found.artifact_bytes)],
        ["instead of", size(found.checkpoint_bytes)],
      ] : [
        ["Artifact", size(found.artifact_bytes)],
        ["instead of", size(found.checkpoint_bytes)],
        ["True ratio", `${significant(found.ratio)} ×`],
        ["Bits per weight", significant(found.true_bits)],
        ...found.parts.map(({ kind, bytes }) => [kind, size(bytes)]),
      ]);
    } catch (error) {
      if (own !== asked) return;
      rows([["Artifact", "–"]]);
      output.textContent = error.message;
    }
  }

  watch(document.getElementById("tuned-files"), (checkpoint) => {
    tuned = checkpoint;
    button.disabled = !tuned;
    preview();
  }, ([chosen]) => {
    // As `deltadock push` names it.
    fields.name.value ||= `finetunes/${chosen.webkitRelativePath.split("/")[0]}`;
    return fields.name.checkValidity() ? fields.name.value : null;
  });
  watch(document.getElementById("text-files"), (found) => { text = found; });
  fields.goal.addEventListener("change", () => {
    fields.value.value = fields.goal.selectedOptions[0].dataset.value;
  });
  form.addEventListener("input", ({ target }) => {
    if (!["base", "method", "goal", "value"].includes(target.name)) return;
    clearTimeout(timer);
    timer = setTimeout(preview, 200);
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    output.textContent = "";
    try {
      const { delta } = await call("POST", "/v1/deltas", {
        name: fields.name.value, base: fields.base.value, checkpoint: tuned.digest,
        ...method(), ...goal(),
        ...(text ? { calibration: { source: "text", digest: text.digest } } : {}),
      });
      location.assign(`/deltas/${delta.id}`);
    } catch (error) {
      output.textContent = error.message;
      button.disabled = false;
    }
  });
  preview();
}
