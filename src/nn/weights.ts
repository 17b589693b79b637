import { BlockTensor } from "../tensor/blocks.ts";
import { ConfigError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** The weight of a product or a table: dense, or block-quantised. */
export type Weight = Tensor | BlockTensor;

/** A view of a model's parameters under a checkpoint path, such as "backbone.layers.3.mixer". */
export class Weights {
  readonly path: string;
  readonly #all: ReadonlyMap<string, Weight>;

  constructor(all: ReadonlyMap<string, Weight>, path = "") {
    this.#all = all;
    this.path = path;
  }

  /** The weights below `name`. */
  at(name: string | number): Weights {
    return new Weights(this.#all, this.path ? `${this.path}.${name}` : String(name));
  }

  /**
   * The tensor called `name` here.
   * @throws ConfigError when it is missing, has another shape or is block-quantised.
   */
  take(name: string, shape: readonly number[]): Tensor {
    const tensor = this.takeWeight(name, shape);
    if (tensor instanceof BlockTensor) {
      const full = this.path ? `${this.path}.${name}` : name;
      throw new ConfigError(`Parameter ${full} must not be quantised, found ${tensor.format}.`);
    }
    return tensor;
  }

  /**
   * The matrix called `name` here, in whatever format it is.
   * @throws ConfigError when it is missing or has another shape.
   */
  takeWeight(name: string, shape: readonly number[]): Weight {
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
