import { ConfigError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** A view of a model's parameters under a checkpoint path, such as "backbone.layers.3.mixer". */
export class Weights {
  readonly path: string;
  readonly #all: ReadonlyMap<string, Tensor>;

  constructor(all: ReadonlyMap<string, Tensor>, path = "") {
    this.#all = all;
    this.path = path;
  }

  /** The weights below `name`. */
  at(name: string | number): Weights {
    return new Weights(this.#all, this.path ? `${this.path}.${name}` : String(name));
  }

  /**
   * The tensor called `name` here.
   * @throws ConfigError when it is missing or has another shape.
   */
  take(name: string, shape: readonly number[]): Tensor {
    const full = this.path ? `${this.path}.${name}` : name;
    const tensor = this.#all.get(full);
    if (!tensor) {
      throw new ConfigError(`The model needs a parameter ${full} of shape [${shape}], but there is none.`);
    }
    if (tensor.shape.join() !== shape.join()) {
      throw new ConfigError(`Parameter ${full} must have shape [${shape}], found [${tensor.shape}].`);
    }
    return tensor;
  }
}
