/** Training, pausing and writing with one model: what the worker does, without the messages around it. */
import { Generator } from "../infer/engine.ts";
import { generateText } from "../infer/text.ts";
import { encodeSafetensors } from "../io/safetensors.ts";
import { parameterEntries } from "../models/checkpoint.ts";
import { serialiseConfig } from "../models/config.ts";
import { NemotronH } from "../models/nemotron_h.ts";
import { createParameters } from "../models/parameters.ts";
import { type Device, openDevice } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";
import { byteTokenizer } from "../text/byte_tokenizer.ts";
import { bitsPerByte } from "../train/packing.ts";
import { TrainingRun } from "../train/run.ts";
import { failureOf } from "./failure.ts";
import { planRun } from "./plan.ts";
import type {
  AdapterSummary, CheckpointFiles, Failure, Memory, Phase, Task, TrainingEvent, TrainOptions, TrainResult,
  WorkerEvent, WriteOptions, WriteResult,
} from "./protocol.ts";
import { rate, StepClock } from "./step_clock.ts";

/** One model on one device. Tasks that would disturb each other are refused. */
export class Session {
  readonly #onLost: (failure: Failure) => void;
  #device: Device | null = null;
  #model: NemotronH | null = null;
  /** The task that has the device; training gives it away while it is paused. */
  #working: Promise<void> | null = null;
  /** Ways to write that this device has compiled shaders for. */
  readonly #compiled = new Set<string>();
  #training: AbortController | null = null;
  #writing: AbortController | null = null;
  /** Ends the pause; null when none is asked for. */
  #pause: Latch | null = null;

  /** @param onLost called when the device is lost, whatever runs */
  constructor(onLost: (failure: Failure) => void) {
    this.#onLost = onLost;
  }

  /** Opens the best adapter. @throws AdapterError when there is none. */
  async open(): Promise<AdapterSummary> {
    const { id, name, kind } = (await this.#usableDevice()).info;
    return { id, name, kind };
  }

  /**
   * Trains a new model in place of the one before.
   * @throws FormatError without enough text; UsageError for a recipe out of range, or while something else
   *   runs; KraitError when the loss is no longer finite; the device's failure.
   */
  async train(options: TrainOptions, emit: (event: TrainingEvent) => void): Promise<TrainResult> {
    if (this.#training) throw new UsageError("Training is already under way; stop it before another run.");
    const work = this.#begin("training");
    const abort = this.#training = new AbortController();
    try {
      return await this.#guarded(() => this.#train(options, emit, abort.signal, work));
    } finally {
      this.#training = null;
      this.#pause = null;
      work.end();
    }
  }

  /** Pauses training after its running step, or as soon as it starts. */
  pause(): void {
    if (this.#training) this.#pause ??= latch();
  }

  resume(): void {
    this.#pause?.end();
    this.#pause = null;
  }

  /** Ends a task after its running step or pass. */
  stop(task: Task): void {
    if (task === "generate") return this.#writing?.abort();
    this.#training?.abort();
    this.resume();
  }

  /**
   * Continues a prompt.
   * @throws UsageError without a model, for settings out of range, or while something else runs; the device's
   *   failure.
   */
  async generate(options: WriteOptions, emit: (event: WorkerEvent) => void): Promise<WriteResult> {
    const model = this.#trained();
    const work = this.#begin("generation");
    const abort = this.#writing = new AbortController();
    try {
      return await this.#guarded(() => this.#write(model, options, emit, abort.signal));
    } finally {
      this.#writing = null;
      work.end();
    }
  }

  /** The model as files. @throws like `generate` */
  async checkpoint(): Promise<CheckpointFiles> {
    const model = this.#trained();
    const work = this.#begin("saving");
    try {
      return await this.#guarded(async () => ({
        weights: await encodeSafetensors(parameterEntries(model), { format: "pt" }),
        config: serialiseConfig(model.config),
      }));
    } finally {
      work.end();
    }
  }

  async #train(
    options: TrainOptions, emit: (event: TrainingEvent) => void, signal: AbortSignal, work: Work,
  ): Promise<TrainResult> {
    let phase: Phase | null = null;
    const enter = (next: Phase) => {
      if (phase !== next) emit({ kind: "phase", phase: next });
      phase = next;
    };
    enter("preparing");
    const { data, config, recipe, train, validation } = planRun(options);
    emit(data);
    const { steps } = recipe;
    const device = await this.#usableDevice();
    this.#forget();
    const parameters = createParameters(device, config, recipe.seed, recipe.weights);
    const model = this.#model = new NemotronH(config, parameters);
    const run = new TrainingRun(model, recipe, train, validation);
    const clock = new StepClock(recipe.batch * recipe.seqlen * recipe.accumulate);
    let done = 0;
    let evaluatedAt = 0;
    let bits_per_byte: number | null = null;
    const evaluate = async () => {
      enter("evaluating");
      const start = performance.now();
      const result = await run.evaluate();
      clock.total += performance.now() - start;
      ({ bits_per_byte } = result);
      evaluatedAt = done;
      emit({ kind: "evaluation", step: done, ...result });
    };
    try {
      while (done < steps && !signal.aborted) {
        if (this.#pause) {
          enter("paused");
          await work.interrupt(this.#pause.over);
          continue;
        }
        enter(done === 0 ? "compiling" : "training");
        const since = performance.now();
        const { loss, lr, grad_norm } = await run.step();
        done++;
        clock.add(performance.now() - since);
        emit({
          kind: "step", step: done, loss, bits_per_byte: bitsPerByte(loss, train), lr, grad_norm,
          tokens_per_s: clock.tokensPerSecond, seconds_left: clock.secondsFor(steps - done),
          memory: memoryOf(device),
        });
        if (recipe.eval_every > 0 && done % recipe.eval_every === 0) await evaluate();
      }
      if (done > 0 && evaluatedAt < done) await evaluate();
    } catch (error) {
      this.#forget(); // the weights of a failed run are worth nothing
      throw error;
    } finally {
      run.dispose();
      device.pool.trim();
    }
    return {
      steps: done, stopped: done < steps, seconds: clock.total / 1000, bits_per_byte,
      memory: memoryOf(device),
    };
  }

  async #write(
    model: NemotronH, options: WriteOptions, emit: (event: WorkerEvent) => void, signal: AbortSignal,
  ): Promise<WriteResult> {
    const { prompt, maxTokens, temperature, seed, draft } = options;
    const tokenizer = byteTokenizer(model.config.vocab_size);
    const tokens = tokenizer.encode(prompt);
    const sampling = { temperature, seed, top_k: 0, top_p: 1, min_p: 0 };
    const generator = new Generator(model, tokens.length + maxTokens + draft);
    try {
      // A few tokens that nobody sees compile the shaders of this way to write: the speed is that of writing.
      const way = `${draft} ${temperature > 0}`;
      if (!this.#compiled.has(way)) {
        const few = { maxTokens: Math.min(3, maxTokens), draft, signal, sampling };
        for await (const _ of generator.generate(tokens, few));
        this.#compiled.add(way);
      }
      const run = generateText(generator, tokenizer, tokens, { maxTokens, draft, signal, sampling });
      for await (const text of run.pieces) emit({ kind: "text", text });
      const { stats } = generator;
      return {
        promptTokens: stats.promptTokens, tokens: run.tokens.length,
        prompt_tokens_per_s: rate(stats.promptTokens, stats.prefillMs),
        tokens_per_s: rate(stats.tokens - 1, stats.decodeMs), // the first token comes with the prompt
        passes: stats.passes, drafted: stats.drafted, accepted: stats.accepted,
        stopped: signal.aborted, memory: memoryOf(model.device),
      };
    } finally {
      generator.dispose();
    }
  }

  /** Runs GPU work. After a failure of the device that is the error, and the next task opens a new device. */
  async #guarded<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      throw this.#device ? await causeOf(error, this.#device) : error;
    } finally {
      if (this.#device?.failure) this.#close();
    }
  }

  #trained(): NemotronH {
    if (!this.#model) throw new UsageError("There is no model yet; train one first.");
    return this.#model;
  }

  /** Takes the device for one task. @throws UsageError when another has it. */
  #begin(what: string): Work {
    if (this.#working) throw new UsageError(`The worker is busy; pause or stop what runs before ${what}.`);
    const take = () => {
      const { over, end } = latch();
      this.#working = over;
      return () => {
        this.#working = null;
        end();
      };
    };
    let end = take();
    return {
      end: () => end(),
      interrupt: async (over) => {
        end();
        await over;
        while (this.#working) await this.#working; // whoever uses the pause finishes first
        end = take();
      },
    };
  }

  async #usableDevice(): Promise<Device> {
    if (this.#device?.failure) this.#close();
    if (this.#device) return this.#device;
    const device = this.#device = await openDevice();
    void device.gpuDevice.lost.then(({ reason }) => {
      if (reason === "destroyed" || !device.failure) return;
      this.#onLost(failureOf(device.failure));
      this.resume(); // a paused run cannot go on, and says so
    });
    return device;
  }

  #forget(): void {
    this.#model?.dispose();
    this.#model = null;
  }

  #close(): void {
    this.#model = null; // its memory goes with the device
    this.#device?.destroy();
    this.#device = null;
    this.#compiled.clear();
  }
}

/** What is behind an error: a read that waits on a lost device fails before the device says it is lost. */
async function causeOf(error: unknown, device: Device): Promise<unknown> {
  if (!device.failure && error instanceof DOMException) {
    await Promise.race([device.gpuDevice.lost, new Promise((resolve) => setTimeout(resolve, 500))]);
  }
  return device.failure ?? error;
}

/** A promise and what fulfils it. */
interface Latch {
  readonly over: Promise<void>;
  readonly end: () => void;
}

function latch(): Latch {
  let end = () => {};
  const over = new Promise<void>((resolve) => {
    end = resolve;
  });
  return { over, end };
}

interface Work {
  end(): void;
  /** Gives the device away until `over` and until it is free again. */
  interrupt(over: Promise<void>): Promise<void>;
}

function memoryOf(device: Device): Memory {
  const { liveBytes: live, peakBytes: peak, heldBytes: held } = device.pool;
  return { live, peak, held };
}
