import type { GradientMap } from "../autograd/tape.ts";
import { adamw } from "../ops/adamw.ts";
import { clip_scale, global_norm } from "../ops/global_norm.ts";
import type { Device } from "../tensor/device.ts";
import { unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";

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

/**
 * AdamW over named parameters. All that changes from step to step (learning rate, bias corrections) lies in a
 * small tensor, so that a captured update can be replayed.
 */
export class AdamW {
  readonly options: AdamWOptions;
  /** First and second moment by parameter name. */
  readonly moments: ReadonlyMap<string, { readonly m: Tensor; readonly v: Tensor }>;
  readonly #parameters: ReadonlyMap<string, Tensor>;
  readonly #hyper: Tensor;

  constructor(device: Device, parameters: ReadonlyMap<string, Tensor>, options: AdamWOptions) {
    this.options = options;
    this.#parameters = parameters;
    [this.#hyper, this.moments] = unscoped(() => [
      device.zeros([8]),
      new Map([...parameters].map(([name, { shape }]) =>
        [name, { m: device.zeros(shape), v: device.zeros(shape) }])),
    ]);
  }

  /** Sets the learning rate of update number `step` (from 0). */
  prepare(step: number, lr: number): void {
    const { eps, weight_decay } = this.options;
    // As the kernel sees them: it forms 1 - beta in f32, and the corrections belong to those values.
    const [beta1, beta2] = this.options.betas.map(Math.fround) as [number, number];
    const values = [lr, beta1, beta2, eps, weight_decay, 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1), 0];
    this.#hyper.write(Float32Array.from(values));
  }

  /**
   * Records one update of every parameter that has a gradient; one without counts as zero and still decays.
   * @returns the global gradient norm before clipping, [1]
   */
  update(gradients: GradientMap): Tensor {
    // In the order of the parameters, whatever that of the gradients: the sum's last bits depend on it.
    const norm = global_norm([...this.#parameters.values()].flatMap(({ key }) => gradients.get(key) ?? []));
    const scale = clip_scale(norm, this.options.clip);
    const decays = this.options.decays ?? decaysByDefault;
    for (const [name, parameter] of this.#parameters) {
      const { m, v } = this.moments.get(name)!;
      const gradient = gradients.get(parameter.key) ?? parameter.device.zeros(parameter.shape);
      adamw(parameter, gradient.reshape(parameter.shape), m, v, this.#hyper, scale, decays(name, parameter));
    }
    return norm;
  }

  dispose(): void {
    this.#hyper.dispose();
    for (const { m, v } of this.moments.values()) for (const tensor of [m, v]) tensor.dispose();
  }
}

/** Matrices decay; norms, biases and the scalars of the state space (A_log, D, dt_bias) do not. */
export function decaysByDefault(name: string, parameter: Tensor): boolean {
  return parameter.shape.length > 1 && !name.endsWith("conv1d.weight");
}
