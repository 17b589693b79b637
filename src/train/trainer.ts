/** The training step: forward, backward, clipping and update, captured once and replayed. */
import { Tape, type GradientMap } from "../autograd/tape.ts";
import type { GraphMemory } from "../gpu/pool.ts";
import type { Graph } from "../gpu/stream.ts";
import { MoE } from "../nn/moe.ts";
import type { Loss, NemotronH, TrainingBatch } from "../models/nemotron_h.ts";
import { accumulate, scale } from "../ops/elementwise.ts";
import { expert_load, update_expert_bias } from "../ops/moe.ts";
import type { Device } from "../tensor/device.ts";
import { KraitError, UsageError } from "../tensor/errors.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { withRoundings } from "../precision/active.ts";
import { FULL_PRECISION, type PrecisionChoice } from "../precision/plan.ts";
import type { Precision } from "../precision/precision.ts";
import { AdamW, type AdamWOptions } from "./optimizer.ts";
import { type Batch, mtpInputs, mtpLabels } from "./packing.ts";
import { MAX_SKIPPED } from "./recipe.ts";
import { TrainingPrecision } from "./rounding.ts";
import type { Schedule } from "./schedule.ts";

export interface TrainerOptions extends AdamWOptions {
  /** Rows and positions of one micro-batch. */
  readonly batch: number;
  readonly seqlen: number;
  /** Micro-batches whose gradients are averaged for one update. */
  readonly accumulate: number;
  readonly schedule: Schedule;
  /** Prediction depths beyond the next token; 0 trains no MTP. */
  readonly mtp_depths: number;
  readonly mtp_scale: number;
  /** Coefficients of the balancing losses of each sequence, of a micro-batch and of a step; default: 0. */
  readonly aux_coeff: number;
  readonly aux_loss?: number;
  readonly global_aux_loss?: number;
  /** Coefficient of the squared log-sum of the routers' logits; default: 0. */
  readonly z_loss?: number;
  /** Step of the correction bias of every expert towards an even load; 0 leaves it. */
  readonly bias_rate: number;
  /** Steps in a row with a loss or a gradient norm that is not finite at which training ends; default 5. */
  readonly max_skipped?: number;
  /** Less memory for a second forward pass of every block; the gradients stay the same bit for bit. */
  readonly recompute?: boolean;
  /** In which formats products are multiplied; default: f32. */
  readonly precision?: PrecisionChoice;
  /** Updates of the whole run, for what changes towards its end; default: nothing changes. */
  readonly steps?: number;
  /** Of random roundings; default 0. */
  readonly seed?: number;
}

export interface StepMetrics {
  readonly step: number;
  /** What is minimised. */
  readonly total: number;
  /** Cross entropy of the next token, nats. */
  readonly loss: number;
  /** Cross entropy per further prediction depth, nats. */
  readonly mtp_loss: readonly number[];
  readonly aux_loss: number;
  /** Before clipping. */
  readonly grad_norm: number;
  readonly lr: number;
  /** Largest load of an expert over the mean load, minus 1, worst layer; null without experts. */
  readonly max_violation: number | null;
  /** Nothing was updated, since the loss or the gradient norm is not finite. */
  readonly skipped: boolean;
  /** Steps of the run so far that were skipped. */
  readonly skipped_steps: number;
}

/** Steps without an update. */
export interface SkippedSteps {
  readonly total: number;
  /** Those since the last update. */
  readonly in_a_row: number;
}

/** Device copies of one micro-batch, overwritten before every replay. */
interface Inputs extends TrainingBatch {
  readonly seq_idx: Tensor;
}

interface Captured {
  readonly micro: Graph;
  /** With several micro-batches: the update from the summed gradients. */
  readonly update: Graph | null;
  /** total, main, aux, gradient norm, one per prediction depth */
  readonly scalars: Tensor;
  /** Tokens per expert, one u32 tensor per MoE layer. */
  readonly loads: readonly Tensor[];
  /** Choices by their scores alone in the step so far, u32 [1, E] per layer; for `global_aux_loss`. */
  readonly soFar: ReadonlyMap<string, Tensor>;
  /** d total / d loss of one micro-batch. */
  readonly seed: Tensor;
}

export class Trainer {
  readonly model: NemotronH;
  readonly options: TrainerOptions;
  readonly optimizer: AdamW;
  /** Steps done so far, those that were skipped included. */
  steps = 0;
  skipped: SkippedSteps = { total: 0, in_a_row: 0 };
  readonly #device: Device;
  readonly #inputs: Inputs;
  readonly #rounding: TrainingPrecision;
  #precision: Precision | null = null;
  #captured: Captured | null = null;
  #evaluation: { graph: Graph; loss: Tensor } | null = null;

  /** @throws UsageError for a model with quantised weights. */
  constructor(model: NemotronH, options: TrainerOptions) {
    const [quantised] = model.quantised;
    if (quantised) {
      throw new UsageError(`Only f32 weights can be trained, but ${quantised[0]} is ${quantised[1].format}.`);
    }
    this.model = model;
    this.options = options;
    this.#device = model.device;
    const { precision = FULL_PRECISION, steps = Infinity, seed = 0 } = options;
    this.#rounding = new TrainingPrecision(model, precision, steps, seed);
    const trainable = new Map([...model.parameters].filter(([, parameter]) => parameter.requiresGrad));
    const shape = [options.batch, options.seqlen];
    const ids = () => this.#device.zeros(shape, "i32");
    [this.optimizer, this.#inputs] = unscoped(() => [new AdamW(model.device, trainable, options), {
      input_ids: ids(), targets: ids(), seq_idx: ids(),
      mtp: Array.from({ length: options.mtp_depths }, () => ({ input_ids: ids(), targets: ids() })),
    }]);
  }

  /**
   * One update from `accumulate` micro-batches. A step whose loss or gradient norm is not finite changes
   * neither parameters, moments nor the experts' correction biases: the device sees to that by itself.
   * @throws KraitError when `max_skipped` steps in a row were skipped.
   */
  async step(batches: readonly Batch[]): Promise<StepMetrics> {
    const { accumulate: micros, schedule } = this.options;
    if (batches.length !== micros) {
      throw new KraitError(`A step needs ${micros} micro-batches, found ${batches.length}.`);
    }
    const lr = schedule(this.steps);
    this.optimizer.prepare(this.steps - this.skipped.total, lr);
    this.#usePrecision();
    const captured = (this.#captured ??= this.#capture());
    if (captured.update) {
      for (const tensor of sums(captured)) tensor.clear();
      this.optimizer.clearGradients();
    }
    batches.forEach((batch, i) => {
      this.#precision?.prepare(this.steps, this.steps * micros + i);
      this.#write(batch);
      this.#device.replay(captured.micro);
    });
    if (captured.update) this.#device.replay(captured.update);
    const scalars = Array.from(await captured.scalars.read());
    const [total, loss, aux_loss, grad_norm] = scalars as [number, number, number, number];
    const step = this.steps++;
    const skipped = !Number.isFinite(total) || !Number.isFinite(grad_norm);
    const { total: before, in_a_row } = this.skipped;
    this.skipped = skipped ? { total: before + 1, in_a_row: in_a_row + 1 } : { total: before, in_a_row: 0 };
    if (skipped) this.#checkSkipped(total, grad_norm);
    return {
      step, total, loss, aux_loss, grad_norm, lr, mtp_loss: scalars.slice(4),
      max_violation: await this.#maxViolation(captured.loads), skipped, skipped_steps: this.skipped.total,
    };
  }

  /** @throws KraitError when so many steps in a row were skipped that a further one is not worth it. */
  #checkSkipped(total: number, grad_norm: number): void {
    const { steps, skipped: { in_a_row } } = this;
    if (in_a_row < (this.options.max_skipped ?? MAX_SKIPPED)) return;
    const what = Number.isFinite(total)
      ? `gradient norm at step ${steps} is ${grad_norm} (loss ${total})`
      : `loss at step ${steps} is ${total} (gradient norm ${grad_norm})`;
    const last = steps - in_a_row;
    const { moments = "f32", precision = FULL_PRECISION } = this.options;
    const halves = [...this.model.parameters.values()].some(({ dtype }) => dtype === "bf16");
    const low = [
      ...precision.recipe === "f32" ? [] : [`precision ${precision.recipe}`],
      ...halves ? ["bf16 weights"] : [], ...moments === "f32" ? [] : [`${moments} moments`],
    ];
    const formats = low.length > 0 ? ` (with ${low.join(" and ")})` : "";
    const which = in_a_row === 1 ? "such a step" : `each of the last ${in_a_row} steps`;
    throw new KraitError(
      `The ${what}, and ${which} was skipped for want of finite numbers${formats}; the parameters are ` +
      `those ${last === 0 ? "of the start" : `after step ${last}`}; lower the learning rate.`);
  }

  /** Memory of a micro-batch's activations; null before the first step. */
  get memory(): GraphMemory | null {
    return this.#captured?.micro.memory ?? null;
  }

  /** The roundings of the next update, for checkpoints; null: none. */
  get precision(): Precision | null {
    return this.#rounding.at(this.steps);
  }

  /** Goes over to the roundings of the next update, and rounds the weights as they are now. */
  #usePrecision(): void {
    const { precision } = this;
    if (precision !== this.#precision) {
      this.#disposeGraphs();
      this.#precision = precision;
    }
    precision?.roundWeights();
  }

  /** Mean cross entropy of the next token over batches, each weighed by its scored positions. Nats. */
  async evaluate(batches: Iterable<Batch>): Promise<number> {
    this.#usePrecision();
    this.#evaluation ??= this.#captureEvaluation();
    const { graph, loss } = this.#evaluation;
    let sum = 0;
    let scored = 0;
    for (const batch of batches) {
      if (batch.scored === 0) continue;
      this.#write(batch);
      this.#device.replay(graph);
      sum += (await loss.item()) * batch.scored;
      scored += batch.scored;
    }
    return sum / scored;
  }

  /** Gives back graphs, inputs and optimiser state; the model stays. */
  dispose(): void {
    this.#disposeGraphs();
    this.#rounding.dispose();
    this.optimizer.dispose();
    const { input_ids, targets, seq_idx, mtp } = this.#inputs;
    for (const tensor of [input_ids, targets, seq_idx]) tensor.dispose();
    for (const depth of mtp) for (const tensor of [depth.input_ids, depth.targets]) tensor.dispose();
  }

  #disposeGraphs(): void {
    for (const graph of [this.#captured?.micro, this.#captured?.update, this.#evaluation?.graph]) {
      if (graph) this.#device.stream.disposeGraph(graph);
    }
    this.#evaluation?.loss.dispose();
    if (this.#captured) {
      for (const tensor of [this.#captured.seed, ...sums(this.#captured)]) tensor.dispose();
    }
    this.#captured = this.#evaluation = null;
  }

  /**
   * One micro-batch's loss and gradients, recorded for replay;
   * with a single micro-batch the update follows at once.
   */
  #capture(): Captured {
    const { accumulate: micros, mtp_depths } = this.options;
    const device = this.#device;
    return unscoped(() => {
      const scalars = device.zeros([4 + mtp_depths]);
      const loads = this.#moeLayers().map(({ bias }) => device.zeros(bias.shape, "u32"));
      const soFar = new Map((this.options.global_aux_loss ?? 0) > 0 ? this.#moeLayers().map(
        ({ path, bias }) => [path, device.zeros([1, bias.size], "u32")]) : []);
      const seed = device.tensor([1 / micros], []);
      const held = { scalars, loads, soFar, seed };
      const micro = device.capture(() => scope(() =>
        withRoundings(this.#precision, () => this.#recordMicroBatch(held)))).graph;
      if (micros === 1) return { micro, update: null, ...held };
      try {
        const { gradients } = this.optimizer;
        const update = device.capture(() => scope(() => this.#recordUpdate(gradients, scalars, loads))).graph;
        return { micro, update, ...held };
      } catch (error) {
        device.stream.disposeGraph(micro);
        throw error;
      }
    });
  }

  #recordMicroBatch(held: Omit<Captured, "micro" | "update">): void {
    const { scalars, loads, soFar, seed } = held;
    const { accumulate: micros, mtp_depths, aux_coeff, aux_loss = 0, global_aux_loss = 0, z_loss = 0 } =
      this.options;
    if (micros === 1) for (const tensor of sums(held)) tensor.clear();
    const balance = { seq_aux: aux_coeff, aux: aux_loss, global_aux: global_aux_loss, z: z_loss, soFar };
    const tape = new Tape();
    let gradients: GradientMap = new Map();
    try {
      const loss = tape.run(() => this.model.loss(this.#inputs, { ...this.options, balance }));
      const places = this.optimizer.gradients;
      gradients = tape.backward([loss.total], [seed], micros === 1 ? places : undefined);
      accumulate(scalars, scale(packScalars(this.#device, loss, mtp_depths), 1 / micros));
      loss.routing.forEach(({ index, layer }) => {
        const i = this.#moeLayers().findIndex(({ path }) => path === layer);
        expert_load(loads[i]!, index);
      });
      if (micros === 1) this.#recordUpdate(gradients, scalars, loads);
      else for (const [key, sum] of places) {
        const gradient = gradients.get(key);
        if (gradient) accumulate(sum, gradient.reshape(sum.shape));
      }
    } finally {
      tape.dispose();
      for (const gradient of gradients.values()) gradient.release();
    }
  }

  #recordUpdate(gradients: GradientMap, scalars: Tensor, loads: readonly Tensor[]): void {
    const { norm, scale: gate } = this.optimizer.update(gradients, scalars.prefix([1]));
    this.#device.stream.copy(norm.storage, norm.byteOffset, scalars.storage, scalars.byteOffset + 12, 4);
    this.#precision?.update();
    const rate = this.options.bias_rate;
    if (rate > 0) this.#moeLayers().forEach(({ bias }, i) => update_expert_bias(bias, loads[i]!, rate, gate));
  }

  #captureEvaluation(): { graph: Graph; loss: Tensor } {
    const { model } = this;
    const { input_ids, targets, seq_idx } = this.#inputs;
    return unscoped(() => {
      const loss = this.#device.zeros([]);
      const { graph } = this.#device.capture(() => scope(() => {
        const evaluate = () => withRoundings(this.#precision, () =>
          model.loss({ input_ids, targets, seq_idx, mtp: [] }, { mtp_scale: 0 }));
        const { main } = this.#precision ? this.#precision.watching(evaluate) : evaluate();
        loss.copyFrom(main);
      }));
      return { graph, loss };
    });
  }

  /** Correction biases of all MoE layers, those of the MTP head included if it is trained. */
  #moeLayers(): { path: string; bias: Tensor }[] {
    const blocks =
      [...this.model.blocks, ...(this.options.mtp_depths > 0 ? this.model.mtp?.blocks ?? [] : [])];
    return blocks.flatMap(({ mixer }) =>
      mixer instanceof MoE ? [{ path: mixer.path, bias: mixer.correction_bias }] : []);
  }

  async #maxViolation(loads: readonly Tensor[]): Promise<number | null> {
    let worst: number | null = null;
    for (const load of loads) {
      const counts = Array.from(await load.read());
      const mean = counts.reduce((a, b) => a + b, 0) / counts.length;
      worst = Math.max(worst ?? 0, Math.max(...counts) / mean - 1);
    }
    return worst;
  }

  #write(batch: Batch): void {
    const { input_ids, targets, seq_idx, mtp } = this.#inputs;
    input_ids.write(batch.input_ids);
    targets.write(batch.labels);
    seq_idx.write(batch.seq_idx);
    mtp.forEach((depth, i) => {
      depth.input_ids.write(mtpInputs(batch, i + 1));
      depth.targets.write(mtpLabels(batch, i + 1));
    });
  }
}

/** What adds up over the micro-batches of a step. */
function sums({ scalars, loads, soFar }: Pick<Captured, "scalars" | "loads" | "soFar">): Tensor[] {
  return [scalars, ...loads, ...soFar.values()];
}

function packScalars(device: Device, loss: Loss, mtp_depths: number): Tensor {
  const packed = device.zeros([4 + mtp_depths]);
  const put = (from: Tensor | null, i: number) => {
    if (from) device.stream.copy(from.storage, from.byteOffset, packed.storage, packed.byteOffset + 4 * i, 4);
  };
  put(loss.total, 0);
  put(loss.main, 1);
  put(loss.aux, 2);
  loss.mtp.forEach((depth, i) => put(depth, 4 + i));
  return packed;
}
