/** What every product of a model is fed with over some text, and how well the model predicts it. */
import { type CheckpointTensor, listCheckpointTensors, listParameters } from "../models/checkpoint_names.ts";
import type { NemotronH } from "../models/nemotron_h.ts";
import { linear_cross_entropy } from "../ops/linear_cross_entropy.ts";
import { watchOps } from "../ops/op.ts";
import { denseWeight } from "../ops/quantize.ts";
import { FormatError } from "../tensor/errors.ts";
import { scope } from "../tensor/scope.ts";
import { Tensor } from "../tensor/tensor.ts";
import { BatchPacker, type Batch, mtpInputs, type TokenCorpus } from "../train/packing.ts";

/** Fewest tokens that say anything about a model. */
const FEWEST_TOKENS = 33;
/** Rows of a product's input that are kept to measure errors with. */
const SAMPLE_ROWS = 128;

export interface CalibrationData {
  readonly calibration: readonly Batch[];
  /** Rows that calibration has not seen, where there is more than one row. */
  readonly evaluation: readonly Batch[];
  /** Whether both are the same. */
  readonly shared: boolean;
  readonly seqlen: number;
  readonly tokens: number;
}

/**
 * Cuts a corpus into rows: the last fifth to evaluate on, of the rest up to `samples` rows, spread evenly, to
 * calibrate with. Rows are shorter than `seqlen` where there is less text.
 * @throws FormatError for a corpus of fewer than 33 tokens
 */
export function calibrationData(corpus: TokenCorpus, seqlen: number, samples: number): CalibrationData {
  const count = corpus.tokens.length;
  if (count < FEWEST_TOKENS) {
    throw new FormatError(
      `The calibration data holds ${count} tokens, expected at least ${FEWEST_TOKENS}.`);
  }
  const length = Math.min(seqlen, count - 1);
  const rows = Math.floor((count - 1) / length);
  const held = rows < 2 ? 0 : Math.max(1, Math.floor(rows / 5));
  const batches = (part: TokenCorpus, most: number): Batch[] => {
    const wanted = Math.min(most, Math.floor((part.tokens.length - 1) / length));
    const batch = Math.min(4, wanted);
    return [...new BatchPacker(part, { batch, seqlen: length }).sequential(wanted - wanted % batch)];
  };
  const cut = (rows - held) * length;
  const calibration = batches(held > 0 ? part(corpus, 0, cut + 1) : corpus, samples);
  const evaluation = held > 0 ? batches(part(corpus, cut, count), Math.max(1, Math.ceil(samples / 2)))
    : calibration;
  return {
    calibration, evaluation, shared: held === 0, seqlen: length,
    tokens: calibration.reduce((sum, { batch }) => sum + batch * length, 0),
  };
}

/** The tokens from .. to of a corpus. */
function part(corpus: TokenCorpus, from: number, to: number): TokenCorpus {
  const tokens = corpus.tokens.slice(from, to);
  const inside = corpus.starts.filter((start) => start > from && start < to).map((start) => start - from);
  return { ...corpus, tokens, starts: Int32Array.from([0, ...inside]) };
}

/** The inputs [rows, width] that a product has met. */
export class InputStats {
  readonly width: number;
  rows = 0;
  /** Largest magnitude of every channel. */
  readonly largest: Float32Array;
  /** Sum of the magnitudes of every channel. */
  readonly sum: Float64Array;
  /** Some of the rows, one after the other. */
  readonly kept: Float32Array[] = [];

  constructor(width: number) {
    this.width = width;
    this.largest = new Float32Array(width);
    this.sum = new Float64Array(width);
  }

  /** Largest magnitude of all. */
  get amax(): number {
    return this.largest.reduce((most, x) => Math.max(most, x), 0);
  }

  add(row: Float32Array, keep: boolean): void {
    this.rows++;
    for (let i = 0; i < this.width; i++) {
      const magnitude = Math.abs(row[i]!);
      this.sum[i]! += magnitude;
      if (magnitude > this.largest[i]!) this.largest[i] = magnitude;
    }
    if (keep) this.kept.push(row.slice());
  }

  merge(other: InputStats): void {
    this.rows += other.rows;
    for (let i = 0; i < this.width; i++) {
      this.sum[i]! += other.sum[i]!;
      this.largest[i] = Math.max(this.largest[i]!, other.largest[i]!);
    }
    this.kept.push(...other.kept.slice(0, SAMPLE_ROWS - this.kept.length).map((row) => row.slice()));
  }

  /** The inputs divided by one number per channel. */
  divide(by: ArrayLike<number>): void {
    for (let i = 0; i < this.width; i++) {
      this.sum[i]! /= by[i]!;
      this.largest[i]! /= by[i]!;
      for (const row of this.kept) row[i]! /= by[i]!;
    }
  }

  /** The kept rows [count, width]. */
  sample(): Float32Array {
    const rows = new Float32Array(this.kept.length * this.width);
    this.kept.forEach((row, i) => rows.set(row, i * this.width));
    return rows;
  }
}

export interface Calibration {
  /** By the checkpoint name of the weight; one for each expert. */
  readonly inputs: ReadonlyMap<string, InputStats>;
  /** Largest magnitudes of keys and values, by the path of the attention layer's mixer. */
  readonly kv: ReadonlyMap<string, { k: number; v: number }>;
}

/**
 * Runs a model with f32 weights over batches and gathers what its products are fed with. Experts that no
 * token was sent to take the inputs of all experts of their layer.
 * @param onBatch called after each batch
 */
export async function calibrate(
  model: NemotronH, batches: readonly Batch[], onBatch: (done: number) => void = () => {},
): Promise<Calibration> {
  const byKey = new Map<number, string>();
  const stacks = new Map<string, CheckpointTensor[]>();
  for (const { name, kind } of listParameters(model.config)) {
    const tensor = model.parameters.get(name);
    if (tensor && kind !== "embedding") byKey.set(tensor.key, name);
  }
  for (const tensor of listCheckpointTensors(model.config)) {
    const { parameter, expert } = tensor;
    if (expert !== null) stacks.set(parameter.name, [...stacks.get(parameter.name) ?? [], tensor]);
  }
  const inputs = new Map<string, InputStats>();
  const kv = new Map<string, { k: number; v: number }>();
  const keepEach = Math.max(1, Math.ceil(SAMPLE_ROWS / batches.length));
  const statsOf = (name: string, width: number): InputStats => {
    let stats = inputs.get(name);
    if (!stats) inputs.set(name, stats = new InputStats(width));
    return stats;
  };
  for (const [done, batch] of batches.entries()) {
    const seen: { name: string; x: Tensor; offsets: Tensor | null; slots: Tensor | null; topk: number }[] =
      [];
    const keys: { path: string; k: Tensor; v: Tensor }[] = [];
    let latest = "";
    scope(() => watchOps((op, args) => {
      if (op === "attention") {
        const [k, v] = args.slice(1) as [Tensor, Tensor];
        keys.push({ path: latest.replace(/\.[qkv]_proj\.weight$/, ""), k: k.retain(), v: v.retain() });
      }
      const [x, weight, offsets] = args;
      const name = weight instanceof Tensor ? byKey.get(weight.key) : undefined;
      if (name === undefined || (op !== "linear" && op !== "grouped_linear")) return;
      latest = name;
      const grouped = op === "grouped_linear";
      const permute = grouped
        ? (args[3] as { permute?: { slot_token: Tensor; topk: number } } | undefined)?.permute : undefined;
      seen.push({
        name, x: (x as Tensor).retain(), offsets: grouped ? (offsets as Tensor).retain() : null,
        slots: permute?.slot_token.retain() ?? null, topk: permute?.topk ?? 1,
      });
    }, () => forward(model, batch)));
    try {
      for (const { name, x, offsets, slots, topk } of seen) {
        const values = await x.read() as Float32Array;
        const width = x.shape.at(-1)!;
        const row = (i: number) => values.subarray(i * width, (i + 1) * width);
        if (!offsets) {
          const count = values.length / width;
          const stride = Math.ceil(count / keepEach);
          const stats = statsOf(name, width);
          for (let i = 0; i < count; i++) stats.add(row(i), i % stride === 0);
          continue;
        }
        const bounds = await offsets.read();
        const order = slots && await slots.read();
        for (const tensor of stacks.get(name)!) {
          const stats = statsOf(tensor.name, width);
          const [from, to] = [bounds[tensor.expert!]!, bounds[tensor.expert! + 1]!];
          const stride = Math.ceil((to - from) / keepEach);
          for (let s = from; s < to; s++) {
            stats.add(row(order ? Math.floor(order[s]! / topk) : s), (s - from) % stride === 0);
          }
        }
      }
      for (const { path, k, v } of keys) {
        const largest = async (x: Tensor) => (await x.read() as Float32Array)
          .reduce((most, value) => Math.max(most, Math.abs(value)), 0);
        const before = kv.get(path) ?? { k: 0, v: 0 };
        kv.set(path, {
          k: Math.max(before.k, await largest(k)), v: Math.max(before.v, await largest(v)),
        });
      }
    } finally {
      for (const { x, offsets, slots } of seen) for (const tensor of [x, offsets, slots]) tensor?.release();
      for (const { k, v } of keys) for (const tensor of [k, v]) tensor.release();
    }
    onBatch(done + 1);
  }
  for (const experts of stacks.values()) {
    const all = experts.map(({ name }) => inputs.get(name)).filter((stats) => stats !== undefined);
    const [met, unmet] = [all.filter(({ rows }) => rows > 0), all.filter(({ rows }) => rows === 0)];
    for (const stats of unmet) for (const other of met) stats.merge(other);
  }
  return { inputs, kv };
}

/** Everything that the model computes of a batch: its predictions, and those of its prediction block. */
function forward(model: NemotronH, batch: Batch): void {
  const { device } = model;
  const shape = [batch.batch, batch.seqlen];
  const context = { seq_idx: device.tensor(batch.seq_idx, shape), step: null, routing: null };
  const h = model.hidden(device.tensor(batch.input_ids, shape), context);
  model.logits(h);
  if (model.mtp && batch.seqlen > 1) {
    model.mtpHidden(h, device.tensor(mtpInputs(batch, 1), shape), context);
  }
}

/** Mean cross entropy of the next token over batches, in nats. */
export async function meanLoss(model: NemotronH, batches: readonly Batch[]): Promise<number> {
  const { device, config: { hidden_size: D } } = model;
  let [sum, scored] = [0, 0];
  for (const batch of batches) {
    const [B, L] = [batch.batch, batch.seqlen];
    const loss = scope(() => {
      const seq_idx = device.tensor(batch.seq_idx, [B, L]);
      const h = model.hidden(device.tensor(batch.input_ids, [B, L]), { seq_idx, step: null, routing: null });
      return linear_cross_entropy(
        h.reshape([B * L, D]), denseWeight(model.lm_head), device.tensor(batch.labels, [B * L]), {});
    });
    const value = (await loss.read().finally(() => loss.dispose()))[0]!;
    sum += value * batch.scored;
    scored += batch.scored;
  }
  return sum / Math.max(scored, 1);
}
