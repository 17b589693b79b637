import { type Division, SOLO } from "./division.ts";
import { linear } from "./product.ts";
import { enter, rowLinear } from "./tensor_parallel.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Weight, Weights } from "./weights.ts";

/** down(relu(up(x))^2): squared ReLU without a gate. Spec: Nemotron-H report, section 2. */
export class MLP {
  readonly up: Weight;
  readonly up_bias: Tensor | null;
  readonly down: Weight;
  readonly down_bias: Tensor | null;
  readonly division: Division;

  /** @param width hidden units of a rank: those of the layer over `division.tp` */
  constructor(hidden: number, width: number, bias: boolean, w: Weights, division: Division = SOLO) {
    this.division = division;
    this.up = w.takeWeight("up_proj.weight", [width, hidden]);
    this.up_bias = bias ? w.take("up_proj.bias", [width]) : null;
    this.down = w.takeWeight("down_proj.weight", [hidden, width]);
    this.down_bias = bias ? w.take("down_proj.bias", [hidden]) : null;
  }

  /** (..., hidden) -> (..., hidden), added to `residual`. */
  forward(x: Tensor, residual: Tensor | null = null): Tensor {
    return this.leave(this.inner(x), residual);
  }

  /** The first half: relu(up(x))^2, (..., hidden) -> (..., width). */
  inner(x: Tensor): Tensor {
    return linear(enter(x, this.division), this.up, this.up_bias, null, { activation: "relu2" });
  }

  /** The second: (..., width) -> (..., hidden), added to `residual`. */
  leave(inner: Tensor, residual: Tensor | null = null): Tensor {
    return rowLinear(inner, this.down, this.down_bias, residual, this.division);
  }
}
