/**
 * Which format every group of weights gets: the least sum of costs within a budget of bits.
 *
 *   minimise sum_g sum_f cost[g][f] x[g][f]   with   sum_f x[g][f] = 1,   sum bits[g][f] x[g][f] <= budget
 *
 * Solved as an integer program with HiGHS, which is loaded when it is needed. Tested in
 * test/null/assign.test.ts.
 */
import { KraitError, UsageError } from "../tensor/errors.ts";

/** What a group may become. */
export interface Choice<F extends string> {
  readonly format: F;
  /** All bits of the group in this format. */
  readonly bits: number;
  /** What it costs in quality; any unit, not negative. */
  readonly cost: number;
}

/**
 * One choice per group.
 * @param groups the choices of every group, at least one each
 * @param weights how many weights there are in all: the budget is bits per weight
 * @throws UsageError when the budget is below what the smallest choices take, or above what the largest do
 */
export async function assignFormats<F extends string>(
  groups: readonly (readonly Choice<F>[])[], weights: number, budget: number,
): Promise<Choice<F>[]> {
  const sumOf = (pick: (...bits: number[]) => number) =>
    groups.reduce((sum, choices) => sum + pick(...choices.map(({ bits }) => bits)), 0) / weights;
  const [least, most] = [sumOf(Math.min), sumOf(Math.max)];
  if (!(budget >= least && budget <= most)) {
    throw new UsageError(
      `The budget must be from ${least.toFixed(3)} (all in the smallest format) to ${most.toFixed(3)} ` +
      `(all in the largest) bits per weight, found ${budget}.`);
  }
  const { default: loadHighs } = await import("highs");
  const highs = await loadHighs();
  // The solver's tolerances are absolute: costs and bits are brought to the order of one.
  const costs = groups.flatMap((choices) => choices.map(({ cost }) => cost));
  const unit = Math.max(...costs, Number.MIN_VALUE);
  const name = (g: number, f: number) => `x${g}_${f}`;
  const terms = (value: (choice: Choice<F>) => number) => groups.flatMap((choices, g) =>
    choices.map((choice, f) => `${value(choice).toPrecision(12)} ${name(g, f)}`)).join(" + ");
  const problem = [
    "Minimize", ` cost: ${terms(({ cost }) => cost / unit)}`, "Subject To",
    ` budget: ${terms(({ bits }) => bits / weights)} <= ${(budget + 1e-9).toPrecision(12)}`,
    ...groups.map((choices, g) => ` one${g}: ${choices.map((_, f) => name(g, f)).join(" + ")} = 1`),
    "Binary", ` ${groups.flatMap((choices, g) => choices.map((_, f) => name(g, f))).join(" ")}`, "End",
  ].join("\n");
  const solution = highs.solve(problem, { output_flag: false, mip_rel_gap: 0, mip_abs_gap: 0 });
  if (solution.Status !== "Optimal") {
    throw new KraitError(`No assignment of formats was found: the solver says ${solution.Status}.`);
  }
  return groups.map((choices, g) =>
    choices.find((_, f) => Number(solution.Columns[name(g, f)]?.Primal) > 0.5)!);
}
