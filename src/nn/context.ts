import type { RouterScore } from "../ops/router.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { MoERun } from "./moe_training.ts";
import type { OffloadRun } from "./offload.ts";
import type { RecomputedModule, Recompute } from "./recompute.ts";
import type { RouterReplay } from "./replay.ts";

/** What an MoE layer decided, for load statistics, the balancing loss and inspection. */
export interface Routing {
  /** Checkpoint path of the layer's mixer. */
  readonly layer: string;
  readonly score: RouterScore;
  /** (tokens, experts), raw router output. */
  readonly logits: Tensor;
  /** (tokens, topk), final weights. */
  readonly weight: Tensor;
  /** (tokens, topk) u32, ascending expert numbers. */
  readonly index: Tensor;
}

/**
 * Pieces of a forward pass through layers up to and with one of experts: what is before its exchange, the way
 * of the tokens to their experts, these, and the way back.
 */
export type PassPiece = "before" | "dispatch" | "experts" | "combine";

/** Rows of tokens that a layer's experts had no room for. */
export interface Overflow {
  /** Checkpoint path of the layer's mixer. */
  readonly layer: string;
  /** Rows there is room for on every rank. */
  readonly rows: number;
  /** u32 [1]: rows that came beyond them. */
  readonly missing: Tensor;
}

/** One forward call: where it stands in the sequence and what it collects on the way. */
export interface ForwardContext {
  /** (batch, seqlen) i32: positions of one document share a value; null: every row is one document. */
  readonly seq_idx: Tensor | null;
  /** Incremental run with caches; null for a plain forward. */
  readonly step: Step | null;
  /** Filled with one entry per MoE layer when given. */
  readonly routing: Routing[] | null;
  /**
   * Filled by MoE layers whose experts have a budget of rows. A pass in which rows are missing has to be done
   * again with a larger budget. Without this list nobody would know: experts then have room for all.
   */
  readonly overflow?: Overflow[] | null;
  /** Training: what runs a second time in the backward pass; default: nothing. */
  readonly recompute?: Recompute;
  /** Training: what lies in host memory until the backward pass; default: nothing. */
  readonly offload?: OffloadRun | null;
  /** Training: what the run asks of MoE layers; else they take every token and route as the model says. */
  readonly moe?: MoERun | null;
  /** Records what routers choose, or makes them choose the same again. */
  readonly replay?: RouterReplay | null;
  /** Told, between two ops, which piece begins; layers of experts that one rank has say nothing. */
  readonly border?: (piece: PassPiece) => void;
}

/** Whether a part of a layer runs a second time for its gradients. */
export function recomputes({ recompute }: ForwardContext, module: RecomputedModule): boolean {
  return recompute?.modules.has(module) ?? false;
}

/** Progress of an incremental run. */
export interface Step {
  /** u32 [1]: tokens already in the caches, as the GPU sees it; a captured step reads it at every replay. */
  readonly position: Tensor;
  /**
   * The same number when the call was recorded. Prefill needs it for shapes;
   * one-token steps must not look at it.
   */
  readonly length: number;
  /** One token per row: states and caches are updated in place. */
  readonly decode: boolean;
  /**
   * Speculation: recurrent states stay as they are and `commit` takes over the accepted tokens afterwards.
   */
  readonly verify?: boolean;
}
