/** Rows of tokens for which a layout's expert_budget has no room: counted in a step, told after it. */
import type { Overflow } from "../nn/context.ts";
import { everyRank, sumOverGroup } from "../ops/collectives.ts";
import { keep_largest } from "../ops/overflow.ts";
import { ExpertOverflow, type MissedRows } from "../tensor/errors.ts";
import { localsOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Limits that one call of a layer can have: rows that arrive, and rows of experts. */
const LIMITS = 2;

/** Of a pipeline stage: for every layer and limit, the most rows that a pass of the step was short of. */
export class OverflowCounts {
  /** u32 [limits], on every rank its own. */
  readonly missing: Tensor;
  /** The sum over the ranks. */
  readonly total: Tensor;
  readonly #layers: readonly string[];
  /** Rows that fit, by place among the limits. */
  readonly #rows: number[] = [];

  /** @param zeros u32 of a length, on every rank */
  constructor(layers: readonly string[], zeros: (length: number) => Tensor) {
    this.#layers = layers;
    this.missing = zeros(LIMITS * layers.length);
    this.total = zeros(LIMITS * layers.length);
  }

  /** Adds what a pass of the stage was short of. */
  collect(overflow: readonly Overflow[]): void {
    let before = "";
    let limit = 0;
    for (const { layer, rows, missing } of overflow) {
      limit = layer === before && limit + 1 < LIMITS ? limit + 1 : 0;
      before = layer;
      const at = LIMITS * this.#layers.indexOf(layer) + limit;
      this.#rows[at] = rows;
      keep_largest(this.missing, missing, at);
    }
  }

  sum(): void {
    this.total.copyFrom(sumOverGroup(this.missing, everyRank(this.missing)));
  }

  /**
   * What was missed in the step that was done last.
   * @param first number of the stage's first rank
   */
  async missed(first: number): Promise<MissedRows[]> {
    if ((await localsOf(this.total)[0]!.read()).every((rows) => rows === 0)) return [];
    const found: MissedRows[] = [];
    for (const [rank, local] of localsOf(this.missing).entries()) {
      (await local.read()).forEach((missing, at) => {
        const fit = this.#rows[at]!;
        const layer = this.#layers[Math.floor(at / LIMITS)]!;
        if (missing > 0) found.push({ rank: first + rank, layer, found: fit + missing, fit });
      });
    }
    return found;
  }
}

/**
 * @param budget that of the layout
 * @param steps done before the one that is given up
 */
export function expertOverflow(missed: readonly MissedRows[], budget: number, steps: number): ExpertOverflow {
  const worst = missed.reduce((a, b) => (b.found / b.fit > a.found / a.fit ? b : a));
  const ranks = [...new Set(missed.map(({ rank }) => rank))].sort((a, b) => a - b);
  const layers = new Set(missed.map(({ layer }) => layer)).size;
  const others = missed.length > 1
    ? ` (the worst of ${layers > 1 ? `${layers} layers, ` : ""}rank${ranks.length > 1 ? "s" : ""} ` +
      `${ranks.join(", ")})` : "";
  const enough = Math.ceil((100 * budget * worst.found) / worst.fit) / 100;
  const held = steps === 0 ? "of the start" : `after step ${steps}`;
  return new ExpertOverflow(missed,
    `The experts of ${worst.layer} on rank ${worst.rank} got ${worst.found} rows of tokens in step ` +
    `${steps + 1}, but expert_budget=${budget} has room for ${worst.fit}${others}; nothing was updated, ` +
    `the parameters are those ${held}; go on with a larger expert_budget in the layout (from ${enough} ` +
    "on these rows fit), or without one.");
}
