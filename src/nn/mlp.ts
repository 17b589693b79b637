import { linear } from "./product.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Weight, Weights } from "./weights.ts";

/** down(relu(up(x))^2): squared ReLU without a gate. Spec: Nemotron-H report, section 2. */
export class MLP {
  readonly up: Weight;
  readonly up_bias: Tensor | null;
  readonly down: Weight;
  readonly down_bias: Tensor | null;

  constructor(hidden: number, width: number, bias: boolean, w: Weights) {
    this.up = w.takeWeight("up_proj.weight", [width, hidden]);
    this.up_bias = bias ? w.take("up_proj.bias", [width]) : null;
    this.down = w.takeWeight("down_proj.weight", [hidden, width]);
    this.down_bias = bias ? w.take("down_proj.bias", [hidden]) : null;
  }

  /** (..., hidden) -> (..., hidden), added to `residual`. */
  forward(x: Tensor, residual: Tensor | null = null): Tensor {
    const inner = linear(x, this.up, this.up_bias, null, { activation: "relu2" });
    return linear(inner, this.down, this.down_bias, residual);
  }
}
