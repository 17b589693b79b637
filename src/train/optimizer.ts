import type { GradientMap } from "../autograd/tape.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import { adamw, stretchTable } from "../ops/adamw.ts";
import { clip_scale, global_norm } from "../ops/global_norm.ts";
import type { Device } from "../tensor/device.ts";
import { unscoped } from "../tensor/scope.ts";
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
  readonly table: Tensor;
}

/**
 * AdamW over named parameters. All that changes from step to step (learning rate, bias corrections) lies in a
 * small tensor, so that a captured update can be replayed. An update takes one launch for every buffer in
 * which there are parameters.
 */
export class AdamW {
  readonly options: AdamWOptions;
  /** First and second moment by parameter name. */
  readonly moments: ReadonlyMap<string, { readonly m: Tensor; readonly v: Tensor }>;
  /** Where an update finds gradients, by `Tensor.key` of their parameters; zero until they are written. */
  readonly gradients: GradientMap = new Map();
  readonly #groups: Group[] = [];
  readonly #hyper: Tensor;

  constructor(device: Device, parameters: ReadonlyMap<string, Tensor>, options: AdamWOptions) {
    this.options = options;
    const decays = options.decays ?? decaysByDefault;
    const moments = new Map<string, { m: Tensor; v: Tensor }>();
    this.#hyper = unscoped(() => {
      const hyper = device.zeros([8]);
      for (const members of byBuffer(parameters)) {
        const start = members[0]![1].byteOffset / 4;
        const last = members.at(-1)![1];
        const size = Math.ceil((last.byteOffset / 4 - start + last.size) / 4) * 4;
        const [grad, m, v] = [device.zeros([size]), device.zeros([size]), device.zeros([size])];
        const stretches = members.map(([name, parameter]) => {
          const { key, shape, byteOffset } = parameter;
          const first = byteOffset / 4 - start;
          this.gradients.set(key, grad.range(first, shape));
          moments.set(name, { m: m.range(first, shape), v: v.range(first, shape) });
          return { first, size: parameter.size, decays: decays(name, parameter) };
        });
        const { storage, byteOffset } = members[0]![1];
        device.pool.retain(storage);
        const param = new Tensor(device, storage, byteOffset, [size], "f32");
        this.#groups.push({ param, grad, m, v, table: stretchTable(device, stretches) });
      }
      return hyper;
    });
    // In the order of the parameters: files list them so.
    this.moments = new Map([...parameters.keys()].map((name) => [name, moments.get(name)!]));
  }

  /** Sets the learning rate of update number `step` (from 0; those that were skipped do not count). */
  prepare(step: number, lr: number): void {
    const { eps, weight_decay } = this.options;
    // As the kernel sees them: it forms 1 - beta in f32, and the corrections belong to those values.
    const [beta1, beta2] = this.options.betas.map(Math.fround) as [number, number];
    const values = [lr, beta1, beta2, eps, weight_decay, 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1), 0];
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
    for (const { param, grad, m, v, table } of this.#groups) {
      adamw(param, grad, m, v, table, this.#hyper, scale);
    }
    return { norm, scale };
  }

  /** Sets every gradient to zero. */
  clearGradients(): void {
    for (const { grad } of this.#groups) grad.clear();
  }

  dispose(): void {
    this.#hyper.dispose();
    for (const tensor of this.gradients.values()) tensor.dispose();
    for (const { m, v } of this.moments.values()) for (const tensor of [m, v]) tensor.dispose();
    for (const group of this.#groups) for (const tensor of Object.values(group)) tensor.dispose();
  }
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
