import { concat_columns } from "../ops/elementwise.ts";
import { linear } from "./product.ts";
import { rms_norm } from "../ops/rms_norm.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Block } from "./block.ts";
import type { Weight, Weights } from "./weights.ts";

/**
 * Multi-token prediction: from the hidden state of position t and the embedding of the token at t+1 a hidden
 * state that predicts t+2. The same weights serve every depth; the output is the next depth's input.
 */
export class MTP {
  readonly enorm: Tensor;
  readonly hnorm: Tensor;
  readonly eh_proj: Weight;
  readonly final_layernorm: Tensor;
  readonly blocks: readonly Block[];
  readonly eps: number;

  /** @param w the weights at "mtp.layers"; `blocks` are built from the same */
  constructor(hidden: number, eps: number, blocks: readonly Block[], w: Weights) {
    this.eps = eps;
    this.blocks = blocks;
    this.enorm = w.at(0).take("enorm.weight", [hidden]);
    this.hnorm = w.at(0).take("hnorm.weight", [hidden]);
    this.eh_proj = w.at(0).takeWeight("eh_proj.weight", [hidden, 2 * hidden]);
    this.final_layernorm = w.at(blocks.length - 1).take("final_layernorm.weight", [hidden]);
  }

  /**
   * @param embedded (batch, seqlen, hidden) embeddings of the next tokens;
   * @param h (batch, seqlen, hidden) after the final norm
   */
  input(embedded: Tensor, h: Tensor): Tensor {
    const both = concat_columns(rms_norm(embedded, this.enorm, this.eps), rms_norm(h, this.hnorm, this.eps));
    return linear(both, this.eh_proj, null);
  }

  /** The final norm: what the shared head reads and the next depth starts from. */
  output(x: Tensor): Tensor {
    return rms_norm(x, this.final_layernorm, this.eps);
  }
}
