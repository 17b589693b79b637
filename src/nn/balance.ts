/** What the routers of a model add to its loss. */
import { gatherFromGroup, sumOverGroup } from "../ops/collectives.ts";
import { add } from "../ops/elementwise.ts";
import { router_aux_counts, router_aux_loss, router_z_loss } from "../ops/router_loss.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Routing } from "./context.ts";
import { type Division, sizeOfGroup } from "./division.ts";

/** Coefficients; 0 leaves a term out. With evenly loaded experts a balancing term is its coefficient. */
export interface BalanceCoefficients {
  /** Balance within each sequence. */
  readonly seq_aux: number;
  /** Balance within a micro-batch. */
  readonly aux: number;
  /** Balance over the micro-batches of a step so far, those of all data-parallel ranks. */
  readonly global_aux: number;
  /** Square of the log of the summed exponentials of the logits. */
  readonly z: number;
}

/**
 * Over whose tokens a count goes: the ranks that share a micro-batch, or all those that share a step.
 */
export type CountSpan = "micro_batch" | "step";

/** How counts of one rank's tokens become counts of all: between counting and use. */
export interface Counting {
  /** The sum over the ranks of a span. */
  counts(counts: Tensor, span: CountSpan): Tensor;
  /** Number of ranks in a span; each has as many tokens. */
  ranks(span: CountSpan): number;
}

export const ONE_RANK: Counting = { counts: (counts) => counts, ranks: () => 1 };

/** Counts over the ranks of a division. */
export function countingOf({ tokens, all_tokens }: Division): Counting {
  const group = (span: CountSpan) => (span === "step" ? all_tokens : tokens);
  return {
    counts: (counts, span) => sumOverGroup(counts, group(span)),
    ranks: (span) => sizeOfGroup(group(span)),
  };
}

/** (tokens, D) of all ranks that share a micro-batch, rank after rank. No gradient. */
export function ofMicroBatch(x: Tensor, { tokens }: Division): Tensor {
  return gatherFromGroup(x, tokens, 0, false);
}

export interface BalanceOptions extends BalanceCoefficients {
  /** Rows of the batch: sequences of equal length. */
  readonly sequences: number;
  /** Choices of this rank's tokens in the step so far, u32 [1, E] by layer; added to. For `global_aux`. */
  readonly soFar?: ReadonlyMap<string, Tensor>;
  /**
   * The step's gradient is a mean over micro-batches, in which `global_aux` of a rank counts for its own
   * tokens alone: with D data-parallel ranks it pulls D times less than `aux` would. As a published
   * implementation does it; otherwise the term is multiplied by D.
   */
  readonly global_aux_per_rank?: boolean;
  readonly counting?: Counting;
}

/** One layer's decisions, and by how much its terms count: a layer that is used n times, 1/n each time. */
export interface Weighed extends Routing {
  readonly share: number;
}

/** The sum of all terms of all layers, a scalar; null where there are none. */
export function balanceLoss(layers: readonly Weighed[], options: BalanceOptions): Tensor | null {
  const terms = layers.flatMap((layer) => termsOf(layer, options));
  return terms.reduce<Tensor | null>((sum, term) => (sum ? add(sum, term) : term), null);
}

function termsOf({ layer, logits, index, score, share }: Weighed, options: BalanceOptions): Tensor[] {
  const { sequences, counting = ONE_RANK, soFar } = options;
  const T = logits.shape[0]!;
  const topk = index.shape[1]!;
  const terms: Tensor[] = [];
  /** @param rows into how many sequences the tokens are cut */
  const aux = (coeff: number, rows: number, span: CountSpan, counts: Tensor) => terms.push(router_aux_loss(
    logits, counting.counts(counts, span),
    { coeff: coeff * share, score, tokens: (T / rows) * counting.ranks(span) }));
  const seq_aux = options.seq_aux;
  if (seq_aux > 0) {
    aux(seq_aux, sequences, "micro_batch", router_aux_counts(logits, { topk, sequences }));
  }
  if (options.aux > 0) aux(options.aux, 1, "micro_batch", router_aux_counts(logits, { topk, sequences: 1 }));
  if (options.global_aux > 0) {
    const running = soFar?.get(layer) ?? null;
    const counts = router_aux_counts(logits, { topk, sequences: 1 }, running);
    running?.copyFrom(counts);
    const groups = counting.ranks("step") / counting.ranks("micro_batch");
    aux(options.global_aux * (options.global_aux_per_rank ? 1 : groups), 1, "step", counts);
  }
  if (options.z > 0) {
    terms.push(router_z_loss(logits, {
      coeff: options.z * share, tokens: T * counting.ranks("micro_batch"),
    }));
  }
  return terms;
}
