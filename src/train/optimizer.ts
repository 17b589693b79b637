import type { GradientMap } from "../autograd/tape.ts";
import type { BufferView } from "../gpu/gpu.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import {
  adamw, MOMENT_BLOCK, MOMENT_DTYPES, momentElements, type MomentFormat, stretchTable,
} from "../ops/adamw.ts";
import { clip_scale, global_norm } from "../ops/global_norm.ts";
import type { Device } from "../tensor/device.ts";
import { bytesPerElement, type DType } from "../tensor/dtype.ts";
import { unscoped } from "../tensor/scope.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { Tensor } from "../tensor/tensor.ts";

export interface AdamWOptions {
  /** Decay rates of the two moments. */
  readonly betas: readonly [number, number];
  readonly eps: number;
  /** Decoupled: p -= lr * weight_decay * p. */
  readonly weight_decay: number;
  /** Largest global gradient norm; Infinity: no clipping. */
  readonly clip: number;
  /** Whether a parameter decays, by name; default: see `decays`. */
  readonly decays?: (name: string, parameter: Tensor) => boolean;
  /** How both moments are stored; default "f32". */
  readonly moments?: MomentFormat;
  /** Whether bf16 parameters have f32 masters, as by default, or are rounded at random. */
  readonly master?: "f32" | "none";
  /** Of the random bits of roundings; default 0. */
  readonly seed?: number;
}

/** A part of the state that belongs to one parameter, as files hold it. */
export interface StateEntry extends BufferView {
  /** `m.NAME` and `v.NAME`; `m_scale.NAME` and `v_scale.NAME` of 8 bits; `low.NAME` of masters. */
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
}

/** What an update found; both [1]. */
export interface UpdateOutcome {
  /** The global gradient norm before clipping. */
  readonly norm: Tensor;
  /** The factor of the gradients; -1 where nothing was updated, since the norm or the loss is not finite. */
  readonly scale: Tensor;
}

/** Parameters that lie in one buffer, and what belongs to them, laid out as they are. */
interface Group {
  readonly param: Tensor;
  readonly grad: Tensor;
  readonly m: Tensor;
  readonly v: Tensor;
  /** Low halves of f32 masters. */
  readonly low: Tensor | null;
  readonly table: Tensor;
}

/** The random stream of the first group's roundings; further groups count on. */
const ROUNDING_STREAM = 0x6f707469;

/**
 * AdamW over named parameters. All that changes from step to step (learning rate, bias corrections) lies in a
 * small tensor, so that a captured update can be replayed. An update takes one launch for every buffer in
 * which there are parameters: bf16 ones, which have buffers of their own, keep f32 gradients.
 */
export class AdamW {
  readonly options: AdamWOptions;
  /** Moments, and what belongs to masters, in the order of the parameters. */
  readonly state: readonly StateEntry[];
  /** Where an update finds gradients, by `Tensor.key` of their parameters; zero until they are written. */
  readonly gradients: GradientMap = new Map();
  readonly #groups: Group[] = [];
  readonly #hyper: Tensor;

  constructor(device: Device, parameters: ReadonlyMap<string, Tensor>, options: AdamWOptions) {
    this.options = options;
    const decays = options.decays ?? decaysByDefault;
    const format = options.moments ?? "f32";
    const dtype = MOMENT_DTYPES[format];
    const state = new Map<string, StateEntry[]>();
    this.#hyper = unscoped(() => {
      const hyper = device.zeros([8]);
      for (const members of byBuffer(parameters)) {
        const { storage, byteOffset: start, dtype: kind } = members[0]![1];
        const width = kind === "f32" ? 4 : 2;
        const last = members.at(-1)![1];
        const size = Math.ceil(((last.byteOffset - start) / width + last.size) / 4) * 4;
        const elements = momentElements(size, dtype);
        const [m, v] = [device.zeros([elements], dtype), device.zeros([elements], dtype)];
        const masters = kind !== "f32" && options.master !== "none";
        const low = masters ? device.zeros([size / 2], "u32") : null;
        const grad = device.zeros([size]);
        const stretches = members.map(([name, parameter]) => {
          const { key, shape, byteOffset } = parameter;
          const first = (byteOffset - start) / width;
          this.gradients.set(key, grad.range(first, shape));
          const entries = [
            ...momentEntries(m, `m.${name}`, first, shape, format),
            ...momentEntries(v, `v.${name}`, first, shape, format),
          ];
          if (low) entries.push(entryOf(low, `low.${name}`, "U16", shape, 2 * first));
          state.set(name, entries);
          return { first, size: parameter.size, decays: decays(name, parameter) };
        });
        device.pool.retain(storage);
        const param = new Tensor(device, storage, start, [size], kind);
        this.#groups.push({ param, grad, m, v, low, table: stretchTable(device, stretches) });
      }
      return hyper;
    });
    this.state = [...parameters.keys()].flatMap((name) => state.get(name)!);
  }

  /** Sets the learning rate of update number `step` (from 0; those that were skipped do not count). */
  prepare(step: number, lr: number): void {
    const { eps, weight_decay } = this.options;
    // As the kernel sees them: it forms 1 - beta in f32, and the corrections belong to those values.
    const [beta1, beta2] = this.options.betas.map(Math.fround) as [number, number];
    const corrections = [1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)];
    const values = [lr, beta1, beta2, eps, weight_decay, ...corrections, step];
    this.#hyper.write(Float32Array.from(values));
  }

  /**
   * Records one update of every parameter; one without a gradient counts as zero and still decays. Where the
   * gradient norm or `loss` is not finite, the device leaves parameters and moments as they are.
   * @param gradients by `Tensor.key`; what does not lie in its place in `this.gradients` is copied there
   * @param loss [] or [1]
   */
  update(gradients: GradientMap, loss: Tensor | null = null): UpdateOutcome {
    for (const [key, place] of this.gradients) {
      const gradient = gradients.get(key);
      if (!gradient) place.clear();
      else if (gradient.storage !== place.storage) place.copyFrom(gradient);
    }
    const norm = global_norm(this.#groups.map(({ grad }) => grad));
    const scale = clip_scale(norm, this.options.clip, loss);
    this.#groups.forEach(({ param, grad, m, v, low, table }, i) => {
      const rounding = { seed: this.options.seed ?? 0, stream: ROUNDING_STREAM + i };
      adamw(param, grad, m, v, table, this.#hyper, scale, low, rounding);
    });
    return { norm, scale };
  }

  /** Sets every gradient to zero. */
  clearGradients(): void {
    for (const { grad } of this.#groups) grad.clear();
  }

  dispose(): void {
    this.#hyper.dispose();
    for (const tensor of this.gradients.values()) tensor.dispose();
    for (const group of this.#groups) for (const tensor of Object.values(group)) tensor?.dispose();
  }
}

function entryOf(
  { device, storage }: Tensor, name: string, dtype: DType, shape: readonly number[], byteOffset: number,
): StateEntry {
  const byteLength = sizeOf(shape) * bytesPerElement(dtype);
  return { device, storage, byteOffset, byteLength, name, dtype, shape };
}

/** Where a parameter's moment lies: from element `first` on, and its scales behind all codes. */
function momentEntries(
  tensor: Tensor, name: string, first: number, shape: readonly number[], format: MomentFormat,
): StateEntry[] {
  const entry = (dtype: DType) =>
    entryOf(tensor, name, dtype, shape, first * bytesPerElement(dtype));
  if (format !== "8bit") return [entry(format === "f32" ? "F32" : "BF16")];
  const blocks = tensor.size / (MOMENT_BLOCK / 4 + 1);
  const scales = Math.ceil(sizeOf(shape) / MOMENT_BLOCK);
  const at = blocks * MOMENT_BLOCK + (4 * first) / MOMENT_BLOCK;
  return [entry("U8"), entryOf(tensor, name.replace(".", "_scale."), "F32", [scales], at)];
}

/** Parameters with those of one buffer side by side, in the order in which they lie there. */
function byBuffer(parameters: ReadonlyMap<string, Tensor>): [string, Tensor][][] {
  const groups = new Map<PooledBuffer, [string, Tensor][]>();
  for (const [name, parameter] of parameters) {
    const group = groups.get(parameter.storage);
    if (group) group.push([name, parameter]);
    else groups.set(parameter.storage, [[name, parameter]]);
  }
  return [...groups.values()].map((group) => group.sort(([, a], [, b]) => a.byteOffset - b.byteOffset));
}

/** Matrices decay; norms, biases and the scalars of the state space (A_log, D, dt_bias) do not. */
export function decaysByDefault(name: string, parameter: Tensor): boolean {
  return parameter.shape.length > 1 && !name.endsWith("conv1d.weight");
}
