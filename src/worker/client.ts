/** The page's side of the worker. */
import { KraitError } from "../tensor/errors.ts";
import type {
  AdapterSummary, Answers, CheckpointFiles, Failure, FailureCode, Task, TrainingEvent, TrainOptions,
  TrainResult, WorkerEvent, WorkerMessage, WorkerRequest, WriteOptions, WriteResult,
} from "./protocol.ts";

/** What went wrong in the worker; `code` tells the kinds apart. */
export class WorkerError extends KraitError {
  override name = "WorkerError";
  readonly code: FailureCode;
  constructor({ code, message }: Failure) {
    super(message);
    this.code = code;
  }
}

interface Pending {
  readonly resolve: (value: never) => void;
  readonly reject: (error: WorkerError) => void;
  readonly onEvent: (event: WorkerEvent) => void;
}

const ignore = () => {};

/**
 * Trains and runs small models in a worker, so that the page stays responsive.
 *
 *   const worker = new Worker(new URL(import.meta.resolve("krait/worker")), { type: "module" });
 *   const krait = new KraitWorker(worker);
 *   await krait.train({ documents: [{ name: "pasted", text }] }, (event) => console.log(event));
 *   await krait.generate({ prompt: "Once", maxTokens: 200, temperature: 0.8, seed: 0, draft: 0 }, show);
 *
 * Promises reject with a WorkerError.
 */
export class KraitWorker {
  readonly #worker: Worker;
  readonly #onLost: (failure: Failure) => void;
  readonly #pending = new Map<number, Pending>();
  #nextId = 1;

  /**
   * @param worker runs `krait/worker` as a module. Bundlers have their own way to make one; Vite:
   *   `import Engine from "krait/worker?worker"`, then `new Engine()`
   * @param onLost called when the GPU device is lost, even while nothing runs; the next `train` opens another
   */
  constructor(worker: Worker, onLost: (failure: Failure) => void = ignore) {
    this.#worker = worker;
    this.#onLost = onLost;
    worker.addEventListener("message", ({ data }: MessageEvent<WorkerMessage>) => this.#receive(data));
    worker.addEventListener("error", ({ message }) => {
      this.#failAll(`The worker failed: ${message || "its script did not load"}.`);
    });
  }

  /** Opens the GPU and says which one it is. `train` does it too. */
  open(): Promise<AdapterSummary> {
    return this.#ask<"open">((id) => ({ kind: "open", id }));
  }

  /** Trains a new model, which then is the one that `generate` and `checkpoint` use. Events come in order. */
  train(options: TrainOptions, onEvent: (event: TrainingEvent) => void = ignore): Promise<TrainResult> {
    return this.#ask<"train">((id) => ({ kind: "train", id, options }), (event) => {
      if (event.kind !== "text") onEvent(event);
    });
  }

  /** Pauses training after the running step. */
  pause(): void {
    this.#send({ kind: "pause" });
  }

  resume(): void {
    this.#send({ kind: "resume" });
  }

  /** Ends a task after its running step or pass; its promise then resolves, and the model stays. */
  stop(task: Task): void {
    this.#send({ kind: "stop", task });
  }

  /** Continues a prompt, handing over the text in pieces. Training must be paused or over. */
  generate(options: WriteOptions, onText: (text: string) => void = ignore): Promise<WriteResult> {
    return this.#ask<"generate">((id) => ({ kind: "generate", id, options }), (event) => {
      if (event.kind === "text") onText(event.text);
    });
  }

  /** The model's files. Training must be paused or over. */
  checkpoint(): Promise<CheckpointFiles> {
    return this.#ask<"checkpoint">((id) => ({ kind: "checkpoint", id }));
  }

  /** Ends the worker at once; what was asked of it is rejected. */
  terminate(): void {
    this.#worker.terminate();
    this.#failAll("The worker was terminated.");
  }

  #send(request: WorkerRequest): void {
    this.#worker.postMessage(request);
  }

  #ask<K extends keyof Answers>(
    request: (id: number) => WorkerRequest & { readonly kind: K }, onEvent: Pending["onEvent"] = ignore,
  ): Promise<Answers[K]> {
    const id = this.#nextId++;
    return new Promise<Answers[K]>((resolve, reject) => {
      this.#pending.set(id, { resolve, reject, onEvent });
      this.#send(request(id));
    });
  }

  #receive(message: WorkerMessage): void {
    switch (message.kind) {
      case "event":
        return this.#pending.get(message.id)?.onEvent(message.event);
      case "lost":
        return this.#onLost(message.error);
      case "done":
        this.#take(message.id)?.resolve(message.value as never);
        return;
      case "failed":
        this.#take(message.id)?.reject(new WorkerError(message.error));
        return;
    }
  }

  #take(id: number): Pending | undefined {
    const pending = this.#pending.get(id);
    this.#pending.delete(id);
    return pending;
  }

  #failAll(message: string): void {
    const waiting = [...this.#pending.values()];
    this.#pending.clear();
    for (const { reject } of waiting) reject(new WorkerError({ code: "failed", message }));
  }
}
