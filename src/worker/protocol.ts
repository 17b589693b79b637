/**
 * What a page and the worker say to each other. Every message is a plain object that structured cloning
 * carries.
 *
 * A request with an `id` is answered by exactly one `done` or `failed` with that id. In between come the
 * events of the task. One task runs at a time; while training is paused, text may be generated and the
 * checkpoint taken.
 */
import type { AdapterKind } from "../gpu/adapters.ts";
import type { Document } from "../train/data.ts";
import type { Recipe } from "../train/recipe.ts";

/** Work that can be stopped. */
export type Task = "train" | "generate";

export type WorkerRequest =
  | { readonly kind: "open"; readonly id: number }
  | { readonly kind: "train"; readonly id: number; readonly options: TrainOptions }
  | { readonly kind: "generate"; readonly id: number; readonly options: WriteOptions }
  | { readonly kind: "checkpoint"; readonly id: number }
  | { readonly kind: "pause" }
  | { readonly kind: "resume" }
  | { readonly kind: "stop"; readonly task: Task };

export type WorkerMessage =
  | { readonly kind: "event"; readonly id: number; readonly event: WorkerEvent }
  | { readonly kind: "done"; readonly id: number; readonly value: Answers[keyof Answers] }
  | { readonly kind: "failed"; readonly id: number; readonly error: Failure }
  /** The GPU device is gone, and the model with it. */
  | { readonly kind: "lost"; readonly error: Failure };

/** What happens in the course of a `train` or a `generate`. */
export type WorkerEvent = TrainingEvent | TextEvent;

/** What the requests with an answer resolve to. */
export interface Answers {
  open: AdapterSummary;
  train: TrainResult;
  generate: WriteResult;
  checkpoint: CheckpointFiles;
}

export interface AdapterSummary {
  readonly id: string;
  readonly name: string;
  readonly kind: AdapterKind;
}

export interface TrainOptions {
  /** Each stands alone. A single one keeps its end for validation. */
  readonly documents: readonly Document[];
  /** A preset with a byte vocabulary. Default "tiny". */
  readonly preset?: string | undefined;
  /** Default of `eval_every`: a tenth of the steps, at least 10; of `eval_rows`: eight batches. */
  readonly recipe?: { readonly [key in keyof Recipe]?: Recipe[key] | undefined } | undefined;
}

export interface TrainResult {
  /** Updates that were made. */
  readonly steps: number;
  /** Stopped before the last step. */
  readonly stopped: boolean;
  /** Time spent on training and evaluation, pauses left out. */
  readonly seconds: number;
  /** Of the validation text after the last step; null when stopped before the first. */
  readonly bits_per_byte: number | null;
  readonly memory: Memory;
}

export interface WriteOptions {
  readonly prompt: string;
  /** Most bytes to write. */
  readonly maxTokens: number;
  /** 0 takes the most probable byte. */
  readonly temperature: number;
  readonly seed: number;
  /** Bytes drafted by the MTP head per pass; 0: none. */
  readonly draft: number;
}

export interface WriteResult {
  readonly promptTokens: number;
  readonly tokens: number;
  /** Prompt tokens per second, and written ones. */
  readonly prompt_tokens_per_s: number;
  readonly tokens_per_s: number;
  /** Passes over the model while writing. */
  readonly passes: number;
  readonly drafted: number;
  readonly accepted: number;
  readonly stopped: boolean;
  readonly memory: Memory;
}

/** A checkpoint as the command line and other programs read it. */
export interface CheckpointFiles {
  /** model.safetensors */
  readonly weights: Uint8Array<ArrayBuffer>;
  /** config.json */
  readonly config: string;
}

/** Bytes of GPU buffers: in use now, most so far, and taken from the driver. */
export interface Memory {
  readonly live: number;
  readonly peak: number;
  readonly held: number;
}

/** "compiling" lasts until the first step is done; from then on the shaders are there. */
export type Phase = "preparing" | "compiling" | "training" | "evaluating" | "paused";

export type TrainingEvent =
  | { readonly kind: "phase"; readonly phase: Phase }
  | DataEvent | StepEvent | EvaluationEvent;

/** What is trained on, and what counting alone achieves on the validation text. */
export interface DataEvent {
  readonly kind: "data";
  readonly parameters: number;
  readonly steps: number;
  readonly train_bytes: number;
  readonly validation_bytes: number;
  /** Bits per byte of the validation text. */
  readonly baselines: { readonly unigram: number; readonly bigram: number; readonly trigram: number };
}

export interface StepEvent {
  readonly kind: "step";
  /** Finished steps. */
  readonly step: number;
  /** Cross entropy of the next token, nats. */
  readonly loss: number;
  /** The same in bits per byte of the training text. */
  readonly bits_per_byte: number;
  readonly lr: number;
  readonly grad_norm: number;
  /** Mean over the last steps; of this step alone while there are no others. */
  readonly tokens_per_s: number;
  /** Null until a step without compilation has been timed. */
  readonly seconds_left: number | null;
  readonly memory: Memory;
}

export interface EvaluationEvent {
  readonly kind: "evaluation";
  readonly step: number;
  readonly loss: number;
  readonly bits_per_byte: number;
}

/** The next piece of generated text; never half of a character. */
export interface TextEvent {
  readonly kind: "text";
  readonly text: string;
}

/**
 * no-webgpu: the browser has no WebGPU, or no adapter; device-lost and out-of-memory: the GPU gave up, a new
 * start may work; input: the message says what to change; failed: anything else.
 */
export type FailureCode = "no-webgpu" | "device-lost" | "out-of-memory" | "input" | "failed";

export interface Failure {
  readonly code: FailureCode;
  /** One sentence. */
  readonly message: string;
}
