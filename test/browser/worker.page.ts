import { KraitWorker, WorkerError } from "../../src/worker/client.ts";
import type { TrainingEvent, TrainOptions, WriteOptions } from "../../src/worker/protocol.ts";

export interface WorkerReport {
  /** Code and message of what was refused, by what was tried. */
  readonly refusals: Readonly<Record<string, string>>;
  /** Events of a run that was paused after its second step and then stopped; texts are left out. */
  readonly events: readonly TrainingEvent[];
  readonly steps: number;
  readonly stopped: boolean;
  readonly written: string;
  /** Bytes in use after a first and after a second run of the same kind. */
  readonly live: readonly [number, number];
}

const TEXT = "All work and no play makes Jack a dull boy.\n".repeat(40);
const RUN: TrainOptions = {
  documents: [{ name: "jack", text: TEXT }], recipe: { steps: 3, batch: 1, seqlen: 16, eval_rows: 1 },
};
const WRITE: WriteOptions = { prompt: "All", maxTokens: 4, temperature: 0, seed: 0, draft: 0 };

/** A worker that runs `prelude` before its own script. */
function start(prelude: string): { worker: Worker; krait: KraitWorker } {
  const entry = new URL("/src/worker/worker.ts", location.href).href;
  const first = URL.createObjectURL(new Blob([prelude], { type: "text/javascript" }));
  // Two imports run in order, and messages wait until both are done.
  const script = `import ${JSON.stringify(first)}; import ${JSON.stringify(entry)};`;
  const whole = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const worker = new Worker(whole, { type: "module" });
  return { worker, krait: new KraitWorker(worker) };
}

async function refusal(work: Promise<unknown>): Promise<string> {
  try {
    await work;
  } catch (error) {
    if (!(error instanceof WorkerError)) throw error;
    return `${error.code}: ${error.message}`;
  }
  return "nothing was refused";
}

/** Takes a worker through refusals, a lost device, a new start, a pause and a stop. */
export default async function drive(): Promise<WorkerReport> {
  const refusals: Record<string, string> = {};
  const blind = start(`Object.defineProperty(WorkerNavigator.prototype, "gpu", { get: () => undefined });`);
  refusals["no WebGPU"] = await refusal(blind.krait.open());
  refusals["training without WebGPU"] = await refusal(blind.krait.train(RUN));
  const waiting = refusal(blind.krait.open());
  blind.krait.terminate();
  refusals["terminated"] = await waiting;
  const missing = new Worker(new URL("/src/worker/absent.js", location.href), { type: "module" });
  refusals["no script"] = await refusal(new KraitWorker(missing).open());

  // The device can be taken away from outside, as a driver would.
  const { worker, krait } = start(`
    const request = GPUAdapter.prototype.requestDevice;
    let device;
    GPUAdapter.prototype.requestDevice = async function (...wishes) {
      return (device = await request.apply(this, wishes));
    };
    addEventListener("message", ({ data }) => { if (data === "break") device.destroy(); });`);
  refusals["generating without a model"] = await refusal(krait.generate(WRITE));
  refusals["saving without a model"] = await refusal(krait.checkpoint());
  refusals["no text"] = await refusal(krait.train({ documents: [{ name: "empty", text: "" }] }));
  refusals["no steps"] = await refusal(krait.train({ ...RUN, recipe: { steps: 0 } }));
  refusals["no such preset"] = await refusal(krait.train({ ...RUN, preset: "huge" }));

  const first = await krait.train(RUN);
  refusals["no prompt"] = await refusal(krait.generate({ ...WRITE, prompt: "" }));
  const lost = krait.train({ ...RUN, recipe: { ...RUN.recipe, steps: 1000 } }, (event) => {
    if (event.kind === "step" && event.step === 2) worker.postMessage("break");
  });
  refusals["training twice"] = await refusal(krait.train(RUN));
  refusals["generating while training"] = await refusal(krait.generate(WRITE));
  refusals["device taken away"] = await refusal(lost);
  refusals["generating after the loss"] = await refusal(krait.generate(WRITE));

  const events: TrainingEvent[] = [];
  let written = "";
  const result = await krait.train({ ...RUN, recipe: { ...RUN.recipe, steps: 1000 } }, (event) => {
    events.push(event);
    if (event.kind === "step" && event.step === 2) krait.pause();
    if (event.kind === "phase" && event.phase === "paused") {
      void krait.generate(WRITE, (text) => (written += text)).then(() => krait.stop("train"));
    }
  });
  krait.terminate();
  return {
    refusals, events, steps: result.steps, stopped: result.stopped, written,
    live: [first.memory.live, result.memory.live],
  };
}
