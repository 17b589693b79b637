/** The page: text and settings in, a trained model and its writing out. The engine runs in a worker. */
import { KraitWorker, lossCurve } from "krait";
import type { Failure, Phase, TrainingEvent, WriteResult } from "krait";
import Engine from "krait/worker?worker";
import { Chart } from "./chart.ts";
import { element, field, save } from "./dom.ts";
import { bits, count, duration, memory, percent, speed } from "./format.ts";
import { lighthouseLog } from "./sample_text.ts";
import { bindSettings, readSettings } from "./settings.ts";

const LARGEST_FILE = 8 * 2 ** 20;
/** Bytes that the MTP head drafts per pass. */
const DRAFT = 2;
const PHASES: Record<Phase, string> = {
  preparing: "Reading the text and counting its letters…",
  compiling: "Compiling shaders; the first step takes longest…",
  training: "Training…",
  evaluating: "Trying the model on text it has not seen…",
  paused: "Paused. You can let the model write meanwhile.",
};

const text = element("text", HTMLTextAreaElement);
const files = element("files", HTMLInputElement);
const settings = element("settings", HTMLFormElement);
const writing = element("writing", HTMLFormElement);
const trainButton = element("train", HTMLButtonElement);
const pauseButton = element("pause", HTMLButtonElement);
const stopButton = element("stop", HTMLButtonElement);
const generateButton = element("generate", HTMLButtonElement);
const stopWritingButton = element("stop-writing", HTMLButtonElement);
const status = element("status", HTMLElement);
const writeStatus = element("write-status", HTMLElement);
const output = element("output", HTMLElement);
const written = element("written", HTMLElement);
const downloads = element("downloads", HTMLElement);
const show = (id: string, content: string) => (element(id, HTMLElement).textContent = content);
const onClick = (id: string, act: () => void) => {
  element(id, HTMLButtonElement).addEventListener("click", act);
};

const chart = new Chart(element("chart", SVGSVGElement), ({ step, train, validation }) => {
  show("l-train", bits(train));
  show("l-validation", bits(validation));
  show("l-unit", step === null ? "bits per byte" : `step ${count(step)}`);
});

/** What the buttons depend on. */
const state = { training: false, paused: false, writing: false, saving: false, model: false };

function refresh(): void {
  const resting = !state.training || state.paused;
  trainButton.disabled = state.training || state.writing || state.saving;
  pauseButton.disabled = !state.training;
  pauseButton.textContent = state.paused ? "Resume" : "Pause";
  stopButton.disabled = !state.training;
  generateButton.disabled = !state.model || !resting || state.writing || state.saving;
  stopWritingButton.disabled = !state.writing;
  downloads.hidden = !state.model || !resting;
  for (const button of downloads.querySelectorAll("button")) button.disabled = state.writing || state.saving;
  output.classList.toggle("writing", state.writing);
}

function say(where: HTMLElement, message: string, failed = false): void {
  where.classList.toggle("failed", failed);
  where.textContent = message;
}

/** Shows an error where it arose, with what can be done about it. */
function explain(where: HTMLElement, error: unknown): void {
  const message = error instanceof Error ? error.message : String(error);
  const code = error instanceof Error && "code" in error ? error.code : "failed";
  if (code === "no-webgpu") return giveUp(message);
  const advice = code === "device-lost" ? " Train again: the page then opens the GPU anew."
    : code === "out-of-memory" ? " Try fewer or shorter rows." : "";
  say(where, message + advice, true);
}

/** Puts the notice in the place of everything that needs a GPU. */
function giveUp(reason: string): void {
  element("workbench", HTMLElement).hidden = true;
  element("missing", HTMLElement).hidden = false;
  show("missing-reason", reason);
}

function bindText(): void {
  const measure = () => {
    const bytes = new TextEncoder().encode(text.value).length;
    show("size", bytes === 0 ? "No text yet" : `${count(bytes)} bytes`);
  };
  const take = async (list: Iterable<File>) => {
    const parts: string[] = [];
    for (const file of list) {
      if (file.size > LARGEST_FILE) {
        const limit = `files of up to ${memory(LARGEST_FILE)} can be read here`;
        return say(status, `${file.name} has ${memory(file.size)}; ${limit}.`, true);
      }
      const content = await file.text();
      if (content.includes("\0")) return say(status, `${file.name} does not look like a text.`, true);
      parts.push(content);
    }
    if (parts.length === 0) return;
    text.value = parts.join("\n\n");
    say(status, "Ready when you are.");
    measure();
  };
  const read = (list: Iterable<File>) => void take(list).catch((error: unknown) => explain(status, error));
  text.addEventListener("input", measure);
  onClick("sample", () => {
    text.value = lighthouseLog();
    text.scrollTop = 0;
    measure();
  });
  onClick("open", () => files.click());
  files.addEventListener("change", () => {
    read(files.files ?? []);
    files.value = ""; // so that the same file can be chosen again
  });
  const carriesFiles = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
  // The whole page takes files, so that one dropped beside the box does not replace the page.
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    text.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) text.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    text.classList.remove("dropping");
    if (!carriesFiles(event)) return;
    event.preventDefault();
    read(event.dataTransfer?.files ?? []);
  });
  measure();
}

function onTraining(event: TrainingEvent, started: { steps: number }): void {
  switch (event.kind) {
    case "phase":
      state.paused = event.phase === "paused";
      say(status, PHASES[event.phase]);
      if (state.paused) say(writeStatus, "Training is paused: the model can write.");
      return refresh();
    case "data": {
      const baselines = Object.entries(event.baselines).map(([label, value]) => ({ label, value }));
      started.steps = event.steps;
      chart.reset(event.steps, baselines.sort((a, b) => b.value - a.value));
      show("facts",
        `${count(event.parameters)} parameters learn ${count(event.train_bytes)} bytes and are tried on ` +
        `${count(event.validation_bytes)} others. Lower is better; dashed is what counting letters, pairs ` +
        "and triples of the same text achieves.");
      return;
    }
    case "step": {
      const { step } = event;
      state.model = true;
      chart.addStep({ step, loss: event.bits_per_byte });
      element("progress", HTMLProgressElement).value = step / started.steps;
      show("f-step", `${count(step)} / ${count(started.steps)}`);
      show("f-speed", speed(event.tokens_per_s));
      show("f-left", event.seconds_left === null ? "–" : duration(event.seconds_left));
      return void show("f-memory", memory(event.memory.held));
    }
    case "evaluation":
      return chart.addEvaluation({ step: event.step, loss: event.bits_per_byte });
  }
}

async function train(krait: KraitWorker): Promise<void> {
  if (!settings.reportValidity()) return;
  const { steps, seed, batch, seqlen, lr } = readSettings(settings);
  Object.assign(state, { training: true, paused: false });
  refresh();
  const hadModel = state.model;
  const prompt = field(writing, "prompt");
  if (prompt.value === "") prompt.value = text.value.trimStart().split("\n", 1)[0]!.slice(0, 60);
  const started = { steps };
  for (const id of ["f-step", "f-speed", "f-left", "f-memory"]) show(id, "–");
  element("progress", HTMLProgressElement).value = 0;
  say(status, PHASES.preparing);
  say(writeStatus, "Pause or finish training to let the model write.");
  try {
    const result = await krait.train(
      { documents: [{ name: "the text", text: text.value }], recipe: { steps, seed, batch, seqlen, lr } },
      (event) => onTraining(event, started));
    state.model = hadModel || result.steps > 0;
    const end = result.stopped ? "Stopped" : "Finished";
    const took = `${end} after ${count(result.steps)} steps and ${duration(result.seconds)}.`;
    const reached = `${bits(result.bits_per_byte)} bits per byte on unseen text.`;
    say(status, result.bits_per_byte === null ? took : `${took} ${reached}`);
    show("f-left", "–");
    show("f-memory", memory(result.memory.held));
    if (state.model) say(writeStatus, "The model is ready to write.");
  } catch (error) {
    explain(status, error);
    state.model = false;
    say(writeStatus, "Train a model first, or pause the one that trains.");
  } finally {
    Object.assign(state, { training: false, paused: false });
    refresh();
  }
}

async function write(krait: KraitWorker): Promise<void> {
  if (!writing.reportValidity()) return;
  const prompt = field(writing, "prompt").value;
  const draft = (field(writing, "draft") as HTMLInputElement).checked ? DRAFT : 0;
  const [maxTokens, temperature, seed] = ["length", "temperature", "seed"]
    .map((name) => Number(field(writing, name).value)) as [number, number, number];
  state.writing = true;
  refresh();
  show("echo", prompt);
  written.textContent = "";
  say(writeStatus, "Writing…");
  try {
    const result = await krait.generate({ prompt, maxTokens, temperature, seed, draft }, (piece) => {
      const follows = output.scrollTop + output.clientHeight > output.scrollHeight - 24;
      written.append(piece);
      if (follows) output.scrollTop = output.scrollHeight;
    });
    report(result, draft > 0 ? "speed-draft" : "speed-plain");
    say(writeStatus, `${count(result.tokens)} bytes at ${speed(result.tokens_per_s)} per second` +
      (draft > 0 ? `; ${percent(result.accepted, result.drafted)} of the drafts were accepted.` : "."));
  } catch (error) {
    explain(writeStatus, error);
  } finally {
    state.writing = false;
    refresh();
  }
}

function report(result: WriteResult, row: string): void {
  const { tokens, passes, drafted, accepted } = result;
  const cells = element(row, HTMLTableRowElement).querySelectorAll("td");
  const figures = [
    speed(result.prompt_tokens_per_s), speed(result.tokens_per_s),
    passes > 0 ? ((tokens - 1) / passes).toFixed(2) : "–", percent(accepted, drafted),
  ];
  cells.forEach((cell, i) => (cell.textContent = figures[i] ?? ""));
}

async function saveModel(krait: KraitWorker, part: "weights" | "config"): Promise<void> {
  state.saving = true;
  refresh();
  try {
    const { weights, config } = await krait.checkpoint();
    if (part === "weights") save("model.safetensors", weights, "application/octet-stream");
    else save("config.json", config, "application/json");
  } catch (error) {
    explain(status, error);
  } finally {
    state.saving = false;
    refresh();
  }
}

async function start(): Promise<void> {
  if (!("gpu" in navigator) || !navigator.gpu) {
    return giveUp(globalThis.isSecureContext
      ? "This browser does not offer WebGPU, the interface to the graphics card that training needs."
      : "This page has an insecure address, where browsers switch WebGPU off. Use https, or localhost.");
  }
  const krait = new KraitWorker(new Engine(), ({ message }: Failure) => {
    state.model = false;
    say(writeStatus, "Train a model first, or pause the one that trains.");
    if (!state.training) explain(status, Object.assign(new Error(message), { code: "device-lost" }));
    refresh();
  });
  bindText();
  bindSettings(settings);
  chart.reset(readSettings(settings).steps, []);
  settings.addEventListener("submit", (event) => {
    event.preventDefault();
    void train(krait);
  });
  writing.addEventListener("submit", (event) => {
    event.preventDefault();
    void write(krait);
  });
  onClick("pause", () => (state.paused ? krait.resume() : krait.pause()));
  onClick("stop", () => krait.stop("train"));
  onClick("stop-writing", () => krait.stop("generate"));
  onClick("save-weights", () => void saveModel(krait, "weights"));
  onClick("save-config", () => void saveModel(krait, "config"));
  onClick("save-chart", () => {
    save("loss.svg", lossCurve({ ...chart.data, yLabel: "bits per byte" }), "image/svg+xml");
  });
  refresh();
  say(status, "Ready when you are.");
  show("adapter", "Looking for a GPU…");
  try {
    const { name, kind } = await krait.open();
    show("adapter", kind === "software" ? `${name}: no graphics card, so this will be slow` : name);
  } catch (error) {
    explain(status, error);
    show("adapter", "");
  }
}

void start();
