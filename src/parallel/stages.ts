/**
 * Which layers lie in which pipeline stage: layout strings ("Et*3|(tt|)*29m|L"), pattern strings with stage
 * boundaries ("M-M-|M-M*-/MM"), and cuts of equal cost. Stage i of pp * vpp is chunk floor(i / pp) of
 * pipeline rank i mod pp. Spec: Megatron Core's pipeline layouts and hybrid layer patterns.
 */
import { flopsByLayer } from "../models/accounting.ts";
import type { NemotronHConfig } from "../models/config.ts";
import type { Part } from "../models/part.ts";
import { UsageError } from "../tensor/errors.ts";
import type { Layout } from "./layout.ts";
import { broken } from "./mesh.ts";

/** Number of the stage that a pipeline rank holds as its chunk. */
export function stageAt(layout: Pick<Layout, "pp">, rank: number, chunk: number): number {
  return chunk * layout.pp + rank;
}

/** The pipeline rank that holds a stage, and as which of its chunks. */
export function placeOfStage(layout: Pick<Layout, "pp">, stage: number): { rank: number; chunk: number } {
  return { rank: stage % layout.pp, chunk: Math.floor(stage / layout.pp) };
}

/**
 * The pp * vpp stages of a model under a layout: those of the layout's string, or cuts of equal cost.
 * @throws UsageError that names the rule, what it expects and what was found
 */
export function stagesOf(layout: Layout, config: NemotronHConfig): Part[] {
  const text = layout.stages;
  if (text === null) return balancedStages(config, layout.pp * layout.vpp);
  checkStages(layout);
  if (isFlexible(text)) return flexibleStages(parseFlexible(text), layout, config);
  const { stages, depths } = parseHybrid(text);
  const { hybrid_override_pattern: pattern, mtp_hybrid_override_pattern: block } = config;
  if (stages.join("") !== pattern) broken("a pattern with stages is the model's", pattern, stages.join(""));
  if (depths.length > 0 && depths[0] !== block) {
    broken("a pattern with stages has the model's prediction block", block || "none", depths[0]!);
  }
  return stagesOfLengths(stages.map((stage) => stage.length), config);
}

/**
 * Checks what a layout's stages obey whatever the model: that they can be read and are pp * vpp.
 * @throws UsageError
 */
export function checkStages({ stages: text, pp, vpp }: Layout): void {
  if (text === null) return;
  const found = isFlexible(text) ? parseFlexible(text).length : parseHybrid(text).stages.length;
  if (found !== pp * vpp) broken("there are pp * vpp stages", `${pp} * ${vpp}`, found);
}

function stagesOfLengths(lengths: readonly number[], config: NemotronHConfig): Part[] {
  let at = 0;
  return lengths.map((length, i) => {
    const isLast = i === lengths.length - 1;
    const mtp = isLast && config.num_nextn_predict_layers > 0;
    return { from: at, to: at += length, embedding: i === 0, mtp, head: isLast };
  });
}

// Layout strings.

/** Whether a text is a layout string, not a pattern with stages: that has no t and no L. */
export function isFlexible(text: string): boolean {
  return /[tmL()]/.test(text);
}

/** Symbols that a string may stand for once its repetitions are written out. */
const MAX_SYMBOLS = 65536;

/**
 * The stages of a layout string, each written out: E embedding, t layer of the chain, m prediction block, L
 * loss. `x*n` and `(...)*n` repeat, `|` separates stages, commas and spaces mean nothing.
 * @throws UsageError for what is no such string, and when E is not first, L not last, or an m lies before a t
 *   or in another stage than the others
 */
export function parseFlexible(text: string): string[] {
  const stages = expand(text.replace(/[\s,]/g, ""), text).split("|");
  const all = stages.join("");
  const count = (symbol: string) => all.split(symbol).length - 1;
  if (count("E") !== 1 || stages[0]![0] !== "E") broken("E is first, once", `E...`, stages[0] || "nothing");
  if (count("L") !== 1 || stages.at(-1)!.at(-1) !== "L") {
    broken("L is last, once", "...L", stages.at(-1) || "nothing");
  }
  if (all.lastIndexOf("t") > all.indexOf("m") && count("m") > 0) {
    broken("every m is after all t", "t...m", formatFlexible(stages));
  }
  const holders = stages.filter((stage) => stage.includes("m"));
  if (holders.length > 1) broken("all m are in one stage", "one", holders.length);
  return stages;
}

/** The shortest usual text of stages that parseFlexible wrote out: `Et*3|(tt|)*29m|L`. */
export function formatFlexible(stages: readonly string[]): string {
  const written = stages.map((stage) =>
    stage.replace(/(.)\1{2,}/g, (run: string, symbol: string) => `${symbol}*${run.length}`));
  let text = "";
  for (let i = 0; i < written.length;) {
    const stage = written[i]!;
    let end = i + 1;
    while (end < written.length - 1 && written[end] === stage) end++;
    const isLast = i === written.length - 1;
    text += end - i > 1 ? `(${stage}|)*${end - i}` : isLast ? stage : `${stage}|`;
    i = end;
  }
  return text;
}

/** Writes repetitions out. `whole` is for messages. */
function expand(text: string, whole: string): string {
  let at = 0;
  const fail = (expected: string): never => {
    const found = at < text.length ? `"${text.slice(at, at + 20)}"` : "its end";
    throw new UsageError(`The stages "${whole}" cannot be read: expected ${expected}, found ${found}.`);
  };
  const repeat = (item: string): string => {
    if (text[at] !== "*") return item;
    const digits = /^\*(\d+)/.exec(text.slice(at, at + 8))?.[1];
    if (digits === undefined || Number(digits) < 1) return fail("* and a number above 0");
    if (Number(digits) * item.length > MAX_SYMBOLS) return fail(`at most ${MAX_SYMBOLS} symbols`);
    at += digits.length + 1;
    return item.repeat(Number(digits));
  };
  const sequence = (depth: number): string => {
    let found = "";
    for (;;) {
      const symbol = text[at];
      if (symbol !== undefined && "EtmL|".includes(symbol)) {
        at++;
        found += repeat(symbol);
      } else if (symbol === "(" && depth < 16) {
        at++;
        const inside = sequence(depth + 1);
        if (text[at] !== ")") return fail("a closing parenthesis");
        at++;
        found += repeat(inside);
      } else {
        if (found.length > MAX_SYMBOLS) return fail(`at most ${MAX_SYMBOLS} symbols`);
        return found;
      }
    }
  };
  const result = sequence(0);
  return at < text.length ? fail("E, t, m, L, |, or a repetition of them") : result;
}

function flexibleStages(stages: readonly string[], layout: Layout, config: NemotronHConfig): Part[] {
  const { pp, vpp } = layout;
  const layers = stages.join("").split("t").length - 1;
  const expected = config.hybrid_override_pattern.length;
  if (layers !== expected) broken("there is one t for each layer", `${expected} layers`, layers);
  const holder = stages.findIndex((stage) => stage.includes("m"));
  const hasBlock = config.num_nextn_predict_layers > 0;
  if (hasBlock !== holder >= 0) {
    const [wanted, found] = hasBlock ? ["m", "none"] : ["no m", "one"];
    broken("there is an m where the model has a prediction block", wanted!, found!);
  }
  if (holder >= 0 && pp > 1 && holder % pp === 0) {
    broken("the prediction block is not on the first pipeline rank", `ranks 1 to ${pp - 1}`, "rank 0");
  }
  if (holder >= 0 && holder < pp * (vpp - 1)) {
    broken("the prediction block is in the last chunk of its rank", `stages from ${pp * (vpp - 1)} on`,
      `stage ${holder}`);
  }
  const lengths = stages.map((stage) => stage.split("t").length - 1);
  return stagesOfLengths(lengths, config).map((stage, i) => ({ ...stage, mtp: i === holder }));
}

// Patterns with stages.

/** A pattern string in parts: the chain cut into stages, and the layers of each prediction depth. */
export interface HybridStages {
  readonly stages: readonly string[];
  readonly depths: readonly string[];
}

const LETTERS = "M*-EGD+";

/**
 * Reads a pattern: M Mamba-2, * attention, - MLP, E experts, G gated delta-net, D sparse attention, + latent
 * attention; `|` separates stages, `/` prediction depths, whose layers must be the same.
 * @throws UsageError for other letters and for depths that differ
 */
export function parseHybrid(text: string): HybridStages {
  const [chain = "", ...depths] = text.split("/");
  const bad = [...text].find((letter) => !`${LETTERS}|/`.includes(letter));
  if (bad !== undefined) {
    broken("a pattern has known letters", `${LETTERS}, | and /`, `"${bad}" in "${text}"`);
  }
  const cut = depths.find((depth) => depth.includes("|"));
  if (cut !== undefined) broken("prediction depths lie in one stage", "no | after /", cut);
  const other = depths.find((depth) => depth === "" || depth !== depths[0]);
  if (other !== undefined) broken("prediction depths are equal", depths[0] || "layers", other || "none");
  return { stages: chain.split("|"), depths };
}

/** The text that parseHybrid reads. */
export function formatHybrid({ stages, depths }: HybridStages): string {
  return [stages.join("|"), ...depths].join("/");
}

// Cuts of equal cost.

/** Of how many keys an attention layer is assumed to see, where cuts are made: the mean of 4096 tokens. */
const USUAL_KEYS = 2048;

/**
 * Cuts the chain into `count` stages of at least one layer so that the costliest stage costs as little as can
 * be, and, of all such cuts, the sum of squares is least. The first stage has the embedding's cost besides,
 * the last the head's and the prediction block's. Cost: operations per token.
 */
export function balancedStages(config: NemotronHConfig, count: number): Part[] {
  const { layers, mtp, head } = flopsByLayer(config, USUAL_KEYS);
  if (count > layers.length) {
    broken("each of the pp * vpp stages has a layer", `at most ${layers.length} stages`, count);
  }
  const costs = [...layers];
  // The table's rows are read forward and added to backward.
  costs[0]! += 2 * config.hidden_size;
  costs[costs.length - 1]! += head + (config.num_nextn_predict_layers > 0 ? mtp + head : 0);
  return stagesOfLengths(partition(costs, count), config);
}

/** Lengths of `count` runs of `costs`, none empty: the largest sum is least, then the sum of squares. */
export function partition(costs: readonly number[], count: number): number[] {
  const sums = [0];
  for (const cost of costs) sums.push(sums.at(-1)! + cost);
  const total = sums.at(-1)!;
  const worst = cutWith(sums, count, (sum) => sum, Math.max);
  // Sums differ in their last bits by where they begin.
  const limit = worst.value * (1 + 1e-12);
  const squares = (sum: number) => (sum > limit ? Infinity : (sum / total) ** 2);
  return cutWith(sums, count, squares, (a, b) => a + b).lengths;
}

/** The cut whose runs' prices are least when joined. `sums[i]` is the cost of the first i items. */
function cutWith(
  sums: readonly number[], count: number, price: (sum: number) => number,
  join: (a: number, b: number) => number,
): { value: number; lengths: number[] } {
  const items = sums.length - 1;
  let best: number[] = sums.map((sum) => price(sum));
  const starts: number[][] = [];
  for (let run = 1; run < count; run++) {
    const next = sums.map(() => Infinity);
    const from = sums.map(() => run);
    for (let end = run + 1; end <= items; end++) {
      for (let start = run; start < end; start++) {
        const value = join(best[start]!, price(sums[end]! - sums[start]!));
        if (value < next[end]!) [next[end], from[end]] = [value, start];
      }
    }
    best = next;
    starts.push(from);
  }
  const lengths: number[] = [];
  let end = items;
  for (const from of starts.reverse()) {
    lengths.unshift(end - from[end]!);
    end = from[end]!;
  }
  return { value: best[items]!, lengths: [end, ...lengths] };
}
