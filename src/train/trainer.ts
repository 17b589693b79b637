/** The training step: forward, backward, clipping and update, captured once and replayed. */
import type { GradientMap } from "../autograd/tape.ts";
import { RankLostError } from "../gpu/errors.ts";
import type { GraphMemory } from "../gpu/pool.ts";
import { ofMicroBatch } from "../nn/balance.ts";
import { MoE } from "../nn/moe.ts";
import { type OffloadChoice, OFFLOAD_OFF } from "../nn/offload.ts";
import { type Recompute, RECOMPUTE_OFF } from "../nn/recompute.ts";
import { checkMoETraining, makeMoETraining, type MoETraining } from "../nn/moe_training.ts";
import type { LossOptions, NemotronH } from "../models/nemotron_h.ts";
import { accumulate, add, scale } from "../ops/elementwise.ts";
import { clip_scale, global_norm } from "../ops/global_norm.ts";
import { update_expert_bias } from "../ops/moe.ts";
import { withhold } from "../ops/overflow.ts";
import { router_quantile, update_quantile_bias } from "../ops/quantile_balance.ts";
import type { RouterOptions } from "../ops/router.ts";
import { parseLayout } from "../parallel/layout.ts";
import { broken, ranksPerStage } from "../parallel/mesh.ts";
import { MeshModel } from "../parallel/model.ts";
import { interleave, scheduleOf as pipelineSchedule } from "../parallel/schedule.ts";
import { stageAt } from "../parallel/stages.ts";
import { KraitError, UsageError } from "../tensor/errors.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import type { Tensor, TensorDType } from "../tensor/tensor.ts";
import { withRoundings } from "../precision/active.ts";
import { FULL_PRECISION, type PrecisionChoice } from "../precision/plan.ts";
import type { Precision } from "../precision/precision.ts";
import { AdamW, type AdamWOptions, OFFLOAD_ELEMENTS } from "./optimizer.ts";
import { expertOverflow, OverflowCounts } from "./overflow.ts";
import type { Batch } from "./packing.ts";
import { addGradients, Passes, type StagePass } from "./passes.ts";
import { inGroups, RankInputs, scoredPositions } from "./rank_inputs.ts";
import { checkMomentBlocks } from "./optimizer_state.ts";
import { type BiasUpdate, MAX_SKIPPED } from "./recipe.ts";
import { TrainingPrecision } from "./rounding.ts";
import type { Schedule } from "./schedule.ts";
import { captureOn, type StepGraph } from "../tensor/step_graph.ts";
import {
  collect, maxViolation, NORM, putInto, readScalars, type StageSums, sumOverRanks, sumsOf,
} from "./step_sums.ts";
import { recordedCollective, type SentCollective, StepTrace } from "./trace.ts";

export interface TrainerOptions extends AdamWOptions {
  /** Rows and positions of one micro-batch. */
  readonly batch: number;
  readonly seqlen: number;
  /** Micro-batches whose gradients are averaged for one update, those of all data-parallel ranks. */
  readonly accumulate: number;
  /** Every scored position counts alike; otherwise, as by default, every micro-batch does. */
  readonly per_token?: boolean;
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
  /**
   * sign: each bias moves by `bias_rate` up or down; quantile: all move by that share of the way to where the
   * logits would be chosen evenly. Default: sign.
   */
  readonly bias_update?: BiasUpdate;
  /** What MoE layers do other than the model says. */
  readonly moe?: Partial<MoETraining>;
  /** Steps in a row with a loss or a gradient norm that is not finite at which training ends; default 5. */
  readonly max_skipped?: number;
  /** What runs a second time to save memory; the gradients stay the same bit for bit. Default: nothing. */
  readonly recompute?: Recompute;
  /** What lies in host memory instead of on the device, but for its use. Changes no bit. Default: nothing. */
  readonly offload?: OffloadChoice;
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

/** Bytes of one rank. */
export interface HeldBytes {
  readonly parameters: number;
  readonly gradients: number;
  /** Moments and masters; none where they lie in host memory. */
  readonly optimizer: number;
  readonly activations: number;
}

interface Captured {
  /** Of one rank at every place in the pipeline. */
  readonly activations: readonly number[];
  /** One micro-batch of every data-parallel rank, or with a pipeline all of a step, the update included. */
  readonly micro: StepGraph;
  /** The update from the summed gradients of several micro-batches. */
  readonly update: StepGraph | null;
  readonly sums: readonly StageSums[];
}

export class Trainer {
  readonly mesh: MeshModel;
  readonly options: TrainerOptions;
  /** Those of the stages. */
  readonly optimizers: readonly AdamW[];
  /** Steps done so far, those that were skipped included. */
  steps = 0;
  skipped: SkippedSteps = { total: 0, in_a_row: 0 };
  /** Inputs of a micro-batch; with a pipeline those of every micro-batch of a step. */
  readonly #inputs: readonly RankInputs[];
  readonly #rounding: TrainingPrecision;
  readonly #moe: MoETraining;
  #precision: Precision | null = null;
  #captured: Captured | null = null;
  #evaluation: { graph: StepGraph; loss: Tensor } | null = null;

  /** @throws UsageError for quantised weights, and for micro-batches that the ranks cannot divide. */
  constructor(model: NemotronH | MeshModel, options: TrainerOptions) {
    const mesh = this.mesh = model instanceof MeshModel ? model : MeshModel.of(model, parseLayout("tp=1"));
    const [quantised] = mesh.stages[0]!.model.quantised;
    if (quantised) {
      throw new UsageError(`Only f32 weights can be trained, but ${quantised[0]} is ${quantised[1].format}.`);
    }
    this.options = options;
    const { precision = FULL_PRECISION, steps = Infinity, seed = 0, accumulate: micros } = options;
    if (options.moments === "8bit") checkMomentBlocks(mesh);
    const { dp } = mesh.layout;
    if (micros % dp !== 0) {
      throw new UsageError(
        `The micro-batches of an update must be a multiple of dp = ${dp}, found accumulate = ${micros}.`);
    }
    this.#checkOverlap();
    this.#moe = makeMoETraining(options.moe ?? {});
    this.#checkRouters();
    const slots = this.#isOneGraph ? micros / dp : 1;
    this.#rounding = new TrainingPrecision(mesh, precision, { ...options, steps, seed, slots });
    const sharing = (name: string) => mesh.parameters.get(name)!.sharing;
    const host_elements = options.offload?.optimizer ? options.host_elements ?? OFFLOAD_ELEMENTS : null;
    const update = { ...options, sharing, host_elements };
    [this.optimizers, this.#inputs] = unscoped(() => [
      mesh.stages.map(({ model: { parameters } }) => new AdamW(
        new Map([...parameters].filter(([, parameter]) => parameter.requiresGrad)), update)),
      Array.from({ length: slots }, () => new RankInputs(mesh, { ...options, random: this.#isRandom })),
    ]);
  }

  /** Whether the passes of a step depend on each other, so that all of them are captured together. */
  get #isOneGraph(): boolean {
    return this.mesh.stages.length > 1 || this.mesh.layout.overlap;
  }

  /** @throws UsageError where exchanges would run a second time, or roundings know of one pass at a time. */
  #checkOverlap(): void {
    const { recompute = RECOMPUTE_OFF, precision = FULL_PRECISION } = this.options;
    const { layers, modules } = recompute;
    if (!this.mesh.layout.overlap) return;
    if (precision.recipe !== "f32") broken("overlap is for f32", "precision f32", precision.recipe);
    const found = layers > 0 ? ["whole layers"]
      : (["moe", "shared_experts"] as const).filter((module) => modules.has(module));
    if (found.length === 0) return;
    broken("overlap keeps what experts and shared experts read",
      "recompute of parts other than whole layers, moe and shared_experts", found.join(" and "));
  }

  /** Whether random numbers are drawn in front of routers. */
  get #isRandom(): boolean {
    return this.#moe.jitter > 0 || this.#moe.forced_balance;
  }

  /** @throws UsageError where the run asks for what the model's routers, or the ranks, cannot do. */
  #checkRouters(): void {
    const { aux_coeff, aux_loss = 0, global_aux_loss = 0, bias_update, bias_rate } = this.options;
    const balancing = aux_coeff > 0 || aux_loss > 0 || global_aux_loss > 0;
    const quantile = bias_update === "quantile" && bias_rate > 0;
    for (const { options } of this.mesh.stages.flatMap((_, stage) => this.#moeLayers(stage))) {
      checkMoETraining(this.#moe, options, { quantile, balancing });
    }
  }

  /** The model of the first stage: with one rank all of it. */
  get model(): NemotronH {
    return this.mesh.stages[0]!.model;
  }

  /**
   * One update from `accumulate` micro-batches. A step whose loss or gradient norm is not finite changes
   * neither parameters, moments nor the experts' correction biases: the device sees to that by itself.
   * @param batches those of data-parallel rank 0, 1, ... for the first pass, then for the second, ...
   * @throws KraitError when `max_skipped` steps in a row were skipped; RankLostError when the device of one
   *   of several ranks is lost; ExpertOverflow when experts got more rows than the layout's expert_budget has
   *   room for: the step then counts as not done.
   */
  async step(batches: readonly Batch[]): Promise<StepMetrics> {
    try {
      return await this.#step(batches);
    } catch (error) {
      throw error instanceof RankLostError ? error.during(`in training step ${this.steps}`) : error;
    }
  }

  async #step(batches: readonly Batch[]): Promise<StepMetrics> {
    const { accumulate: micros, schedule, mtp_scale, mtp_depths } = this.options;
    if (batches.length !== micros) {
      throw new KraitError(`A step needs ${micros} micro-batches, found ${batches.length}.`);
    }
    const lr = schedule(this.steps);
    for (const optimizer of this.optimizers) optimizer.prepare(this.steps - this.skipped.total, lr);
    this.#usePrecision();
    const { micro, update, sums } = this.#captured ??= this.#capture();
    if (update) {
      for (const tensor of sums.flatMap(sumsOf)) tensor.clear();
      for (const optimizer of this.optimizers) optimizer.clearGradients();
    }
    const { dp } = this.mesh.layout;
    const divisor = {
      micros, mtp_scale, scored: this.options.per_token ? scoredPositions(batches, mtp_depths) : null,
    };
    for (let i = 0; i < micros / dp; i++) {
      const numbering = { seed: this.options.seed ?? 0, first: this.steps * micros + i * dp };
      this.#precision?.prepare(this.steps, numbering.first, i % this.#inputs.length);
      this.#inputs[i % this.#inputs.length]!.write(batches.slice(i * dp, (i + 1) * dp), divisor, numbering);
      if (this.#inputs.length === 1) micro.replay();
    }
    if (this.#inputs.length > 1) micro.replay();
    update?.replay();
    await this.#checkOverflow(sums);
    const [loss, grad_norm, aux_loss, mtp_loss] = await readScalars(sums, mtp_depths);
    const total = loss + aux_loss + mtp_loss.reduce((sum, one) => sum + one * mtp_scale / mtp_depths, 0);
    const step = this.steps++;
    const skipped = !Number.isFinite(loss) || !Number.isFinite(grad_norm);
    const { total: before, in_a_row } = this.skipped;
    this.skipped = skipped ? { total: before + 1, in_a_row: in_a_row + 1 } : { total: before, in_a_row: 0 };
    if (skipped) this.#checkSkipped(loss, grad_norm);
    return {
      step, total, loss, aux_loss, grad_norm, lr, mtp_loss,
      max_violation: await maxViolation(sums), skipped, skipped_steps: this.skipped.total,
    };
  }

  /** @throws ExpertOverflow when rows found no place; the device has withheld the update. */
  async #checkOverflow(sums: readonly StageSums[]): Promise<void> {
    const { layout, stages } = this.mesh;
    const missed = (await Promise.all(sums.map(async ({ overflow }, stage) =>
      await overflow?.missed(stages[stage]!.rank * ranksPerStage(layout)) ?? []))).flat();
    if (missed.length > 0) throw expertOverflow(missed, layout.expert_budget!, this.steps);
  }

  /** @throws KraitError when so many steps in a row were skipped that a further one is not worth it. */
  #checkSkipped(loss: number, grad_norm: number): void {
    const { steps, skipped: { in_a_row } } = this;
    if (in_a_row < (this.options.max_skipped ?? MAX_SKIPPED)) return;
    const what = Number.isFinite(loss)
      ? `gradient norm at step ${steps} is ${grad_norm} (loss ${loss})`
      : `loss at step ${steps} is ${loss} (gradient norm ${grad_norm})`;
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

  /** Runs a step piece by piece and tells when each rank would do what, had it a device of its own. */
  async trace(step: () => Promise<unknown>): Promise<StepTrace> {
    const trace = new StepTrace(this.mesh.world);
    const { devices } = this.mesh;
    const profilers = devices.map((device) => device.stream.profiler ? null : device.profile());
    for (const device of devices) {
      device.stream.flush();
      device.stream.tracer = trace.reporter((view) => view.device === device, (view) => device.peek(view));
    }
    try {
      await step();
      for (const device of devices) await device.settle();
    } finally {
      devices.forEach(({ stream }, i) => {
        stream.tracer = null;
        if (!profilers[i]) return;
        stream.profiler = null;
        profilers[i].destroy();
      });
    }
    return trace;
  }

  /** What passes between ranks in a step; empty before the first one. */
  get collectives(): SentCollective[] {
    if (!this.#captured) return [];
    const { micro, update } = this.#captured;
    const replays = this.#inputs.length > 1 ? 1 : this.options.accumulate / this.mesh.layout.dp;
    return [...Array<StepGraph>(replays).fill(micro), ...update ? [update] : []].flatMap(({ traffic }) =>
      traffic.map((one) => recordedCollective(one.traffic, one.pass)));
  }

  /** Memory of a micro-batch's activations, of all those of a pipeline; null before the first step. */
  get memory(): GraphMemory | null {
    return this.#captured?.micro.memory ?? null;
  }

  /**
   * What one rank at every place in the pipeline has in memory: what lasts, and what lies between the forward
   * and the backward passes when that is most. Null before the first step.
   */
  get heldByRank(): readonly HeldBytes[] | null {
    const { layout, stages } = this.mesh;
    const sum = (tensors: Iterable<{ readonly byteLength: number }>) =>
      [...tensors].reduce((bytes, { byteLength }) => bytes + byteLength, 0);
    return this.#captured && this.#captured.activations.map((activations, rank) => {
      const held = stages.flatMap((stage, i) => (stage.rank === rank ? [i] : []));
      const total = (of: (stage: number) => number) => held.reduce((bytes, stage) => bytes + of(stage), 0);
      return {
        parameters: total((stage) => sum([...stages[stage]!.model.parameters.values()].map(
          (parameter) => localsOf(parameter)[0]!))),
        gradients: total((stage) => sum(this.optimizers[stage]!.gradients.values()) / ranksPerStage(layout)),
        optimizer: total((stage) => sum(this.optimizers[stage]!.state.filter(
          ({ place }) => !("host" in place))) / ranksPerStage(layout)),
        activations,
      };
    });
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
    const { dp } = this.mesh.layout;
    let sum = 0;
    let scored = 0;
    for (const group of inGroups(batches, dp)) {
      const positions = group.reduce((total, batch) => total + (batch?.scored ?? 0), 0);
      if (positions === 0) continue;
      const depths = Array<number>(this.options.mtp_depths).fill(0);
      const divisor = { micros: dp, mtp_scale: 0, scored: [positions, ...depths] };
      this.#inputs[0]!.write(group, divisor);
      graph.replay();
      sum += (await localsOf(loss)[0]!.read())[0]! * positions;
      scored += positions;
    }
    return sum / scored;
  }

  /** Gives back graphs, inputs and optimiser state; the model stays. */
  dispose(): void {
    this.#disposeGraphs();
    this.#rounding.dispose();
    for (const owner of [...this.optimizers, ...this.#inputs]) owner.dispose();
  }

  #disposeGraphs(): void {
    this.#captured?.micro.dispose();
    this.#captured?.update?.dispose();
    this.#evaluation?.graph.dispose();
    this.#evaluation?.loss.dispose();
    for (const tensor of this.#captured?.sums.flatMap(sumsOf) ?? []) tensor.dispose();
    this.#captured = this.#evaluation = null;
  }

  /**
   * One micro-batch's loss and gradients, recorded for replay. With a single micro-batch, and with a
   * pipeline, whose passes depend on each other, the update follows at once.
   */
  #capture(): Captured {
    const { accumulate: micros } = this.options;
    const isWhole = this.#isOneGraph || micros === this.mesh.layout.dp;
    return unscoped(() => {
      const sums = this.mesh.stages.map((_, stage) => this.#createSums(stage));
      const record = (step: () => void) => captureOn(this.mesh.devices, () => scope(() =>
        withRoundings(this.#precision, step)));
      let activations: readonly number[] = [];
      const micro = record(() => {
        activations = this.#recordPasses(sums, isWhole);
      });
      if (isWhole) return { micro, update: null, sums, activations };
      try {
        return { micro, update: record(() => this.#recordUpdate(this.optimizers.map(
          ({ gradients }) => gradients), sums)), sums, activations };
      } catch (error) {
        micro.dispose();
        throw error;
      }
    });
  }

  #createSums(stage: number): StageSums {
    const zeros = (shape: readonly number[], dtype: TensorDType) => this.#onRanks(stage, shape, dtype);
    const layers = this.#moeLayers(stage);
    const global = (this.options.global_aux_loss ?? 0) > 0;
    return {
      scalars: zeros([3 + this.options.mtp_depths], "f32"),
      loads: new Map(layers.map(({ path, bias }) => [path, zeros(bias.shape, "u32")])),
      soFar: new Map(global ? layers.map(({ path, bias }) => [path, zeros([1, bias.size], "u32")]) : []),
      estimates: new Map(this.options.bias_update === "quantile"
        ? layers.map(({ path, bias }) => [path, zeros(bias.shape, "f32")]) : []),
      overflow: this.mesh.layout.expert_budget !== null && layers.length > 0
        ? new OverflowCounts(layers.map(({ path }) => path), (length) => zeros([length], "u32")) : null,
    };
  }

  #onRanks(stage: number, shape: readonly number[], dtype: TensorDType): Tensor {
    const [any] = this.mesh.stages[stage]!.model.parameters.values();
    return scope(() => shardedOf(localsOf(any!).map(({ device }) => device.zeros(shape, dtype))));
  }

  /**
   * @param isWhole the update follows; the sums begin here
   * @returns `Passes.activations`
   */
  #recordPasses(sums: readonly StageSums[], isWhole: boolean): readonly number[] {
    const { accumulate: micros } = this.options;
    const { layout, stages } = this.mesh;
    if (isWhole) for (const tensor of sums.flatMap(sumsOf)) tensor.clear();
    const count = this.#isOneGraph ? micros / layout.dp : 1;
    const isOne = isWhole && count === 1;
    if (isWhole && !isOne) for (const optimizer of this.optimizers) optimizer.clearGradients();
    const passes = new Passes(this.mesh, this.#lossOptions(sums));
    const found = stages.map((): GradientMap => new Map());
    try {
      const forwards = (stage: number, micro: number) => {
        const inputs = this.#inputs[micro]!.stages[stage]!;
        return {
          stage, micro, inputs, visit: (pass: StagePass) => {
            collect(pass, inputs, sums[stage]!);
            this.#collectEstimates(pass, sums[stage]!);
          },
        };
      };
      const backwards = (stage: number, micro: number, gradients: GradientMap) => {
        const places = this.optimizers[stage]!.gradients;
        if (isOne) found[stage] = gradients;
        else {
          this.mesh.onStage(stage, `backward ${micro}`, () =>
            addGradients(places, gradients, this.optimizers[stage]!.ranks));
          for (const gradient of gradients.values()) gradient.release();
        }
      };
      const order = this.#order(count);
      for (let at = 0; at < order.length; at++) {
        const { kind, stage, micro, pair } = order[at]!;
        this.#precision?.enter(micro);
        if (pair !== undefined) {
          const beside = order[++at]!;
          backwards(beside.stage, beside.micro, passes.pair(forwards(stage, micro), beside));
        } else if (kind === "forward") passes.forward(forwards(stage, micro));
        else {
          const places = isOne ? this.optimizers[stage]!.gradients : undefined;
          backwards(stage, micro, passes.backward(stage, micro, places));
        }
      }
      if (isWhole) {
        this.#recordUpdate(isOne ? found : this.optimizers.map(({ gradients }) => gradients), sums);
      }
      return passes.activations;
    } finally {
      passes.dispose();
      for (const gradients of found) for (const gradient of gradients.values()) gradient.release();
    }
  }

  /** Adds to the mean of the quantiles over the micro-batches of a step, and over ranks. */
  #collectEstimates({ stage, routing }: StagePass, { scalars, estimates }: StageSums): void {
    for (const { path, bias, options: { topk } } of this.#moeLayers(stage)) {
      const sum = estimates.get(path);
      const calls = routing.filter(({ layer }) => layer === path);
      const parts = calls.length * localsOf(scalars).length * this.options.accumulate / this.mesh.layout.dp;
      for (const { logits } of calls) {
        if (!sum) continue;
        const all = ofMicroBatch(logits, this.mesh.stages[stage]!.model.division);
        accumulate(sum, scale(router_quantile(all, bias, { topk }), 1 / parts));
      }
    }
  }

  /** The passes of so many micro-batches, one after the other; the two of a pair side by side. */
  #order(count: number): { kind: "forward" | "backward"; stage: number; micro: number; pair?: number }[] {
    const { layout } = this.mesh;
    return interleave(pipelineSchedule(layout, count)).map(({ rank, chunk, ...action }) => (
      { ...action, stage: stageAt(layout, rank, chunk) }));
  }

  #lossOptions(sums: readonly StageSums[]): LossOptions {
    const { aux_coeff, aux_loss = 0, global_aux_loss = 0, z_loss = 0, mtp_scale } = this.options;
    const { recompute = RECOMPUTE_OFF, offload = OFFLOAD_OFF } = this.options;
    const soFar = new Map(sums.flatMap((stage) => [...stage.soFar]));
    const balance = { seq_aux: aux_coeff, aux: aux_loss, global_aux: global_aux_loss, z: z_loss, soFar };
    return { mtp_scale, balance, moe: this.#moe, recompute, offload };
  }

  /** Sums over ranks, the gradient norm over all of them, and the update. */
  #recordUpdate(gradients: readonly GradientMap[], sums: readonly StageSums[]): void {
    const { optimizers, mesh: { stages } } = this;
    const onStages = <T>(body: (stage: number) => T): T[] => stages.map((_, stage) =>
      this.mesh.onStage(stage, "update", () => body(stage)));
    const reduced = onStages((stage) => {
      const { scalars, loads, estimates, overflow } = sums[stage]!;
      sumOverRanks([scalars, ...loads.values(), ...estimates.values()]);
      overflow?.sum();
      return optimizers[stage]!.reduce(gradients[stage]!);
    });
    this.#tie(reduced);
    const norms = onStages((stage) => optimizers[stage]!.norm(reduced[stage]!));
    const loss = sums.at(-1)!.scalars.prefix([1]);
    onStages((stage) => {
      const { scalars, loads, estimates } = sums[stage]!;
      const here = (x: Tensor, of: number) => (of === stage ? x : this.mesh.sendTo(x, of, stage));
      const norm = norms.length === 1 ? norms[0]! : global_norm(norms.map(here));
      const gate = sums.reduce(
        (found, { overflow }, of) => (overflow ? withhold(found, here(overflow.total, of)) : found),
        clip_scale(norm, this.options.clip, here(loss, stages.length - 1)));
      optimizers[stage]!.apply(reduced[stage]!, gate);
      putInto(scalars, NORM, norm);
      const rate = this.options.bias_rate;
      if (rate > 0) for (const { path, bias } of this.#moeLayers(stage)) {
        const estimate = estimates.get(path);
        if (estimate) update_quantile_bias(bias, estimate, rate, gate);
        else update_expert_bias(bias, loads.get(path)!, rate, gate);
      }
      this.#precision?.update(stage);
    });
  }

  /** Sums the gradients of a parameter that two stages hold. */
  #tie(reduced: readonly Tensor[][]): void {
    for (const [name, { held }] of this.mesh.parameters) {
      const [first, second] = held;
      if (!first || !second) continue;
      const [i, j] = [first, second].map(({ stage }) => this.optimizers[stage]!.bufferOf(name)) as
        [number, number];
      const [here, there] = [first.stage, second.stage];
      const sum = this.mesh.onStage(here, "update", () =>
        add(reduced[here]![i]!, this.mesh.sendTo(reduced[there]![j]!, there, here)));
      reduced[here]![i] = sum;
      reduced[there]![j] = this.mesh.sendTo(sum, here, there);
    }
  }

  #captureEvaluation(): { graph: StepGraph; loss: Tensor } {
    const inputs = this.#inputs[0]!.stages.map((stage) => ({ ...stage, mtp: [] }));
    const last = inputs.length - 1;
    const passes = new Passes(this.mesh, { mtp_scale: 0 });
    return unscoped(() => {
      const loss = this.#onRanks(last, [3 + this.options.mtp_depths], "f32");
      const graph = captureOn(this.mesh.devices, () => scope(() => {
        const evaluate = () => withRoundings(this.#precision, () => passes.evaluate(inputs));
        const pass = this.#precision ? this.#precision.watching(evaluate) : evaluate();
        loss.clear();
        collect(pass, inputs[last]!, {
          scalars: loss, loads: new Map(), soFar: new Map(), estimates: new Map(), overflow: null,
        });
        sumOverRanks([loss]);
      }));
      return { graph, loss };
    });
  }

  /** Correction biases of the MoE layers of a stage, those of the MTP head included if it is trained. */
  #moeLayers(stage: number): { path: string; bias: Tensor; options: RouterOptions }[] {
    const { model } = this.mesh.stages[stage]!;
    const blocks = [...model.blocks, ...(this.options.mtp_depths > 0 ? model.mtp?.blocks ?? [] : [])];
    return blocks.flatMap(({ mixer }) =>
      mixer instanceof MoE
        ? [{ path: mixer.path, bias: mixer.correction_bias, options: mixer.options }] : []);
  }

}
