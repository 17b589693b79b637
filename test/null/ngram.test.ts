import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { UsageError } from "../../src/tensor/errors.ts";
import { NgramModel, ngramBaselines } from "../../src/train/ngram.ts";
import { type TokenCorpus, tokenizeDocuments } from "../../src/train/packing.ts";

const END = 256;
const VOCAB = 257;
const tokenizer = { eosId: END, encode: (text: string) => new TextEncoder().encode(text) };
const corpusOf = (...texts: string[]) => {
  return tokenizeDocuments(texts.map((text) => ({ name: "", text })), tokenizer);
};

/** The formula of the model, straight from counts over all positions and without tables. */
function wittenBell(train: TokenCorpus, context: readonly number[], token: number, order: number): number {
  if (order === 0) return 1 / VOCAB;
  const history = context.slice(context.length - (order - 1));
  if (history.length < order - 1) return wittenBell(train, context, token, order - 1);
  const seen: number[] = [];
  for (let i = 1; i < train.tokens.length; i++) {
    const start = train.starts.findLast((s) => s <= i)!;
    if (i === start || i - (order - 1) < start) continue;
    if (history.every((h, k) => train.tokens[i - (order - 1) + k] === h)) seen.push(train.tokens[i]!);
  }
  const lower = wittenBell(train, context, token, order - 1);
  const kinds = new Set(seen).size;
  if (kinds === 0) return lower;
  return (seen.filter((t) => t === token).length + kinds * lower) / (seen.length + kinds);
}

describe("NgramModel", () => {
  test("gives the probabilities that the formula gives by hand", () => {
    // Scored: b, a, b, END after a; so counts a 1, b 2, END 1, three kinds, four in all.
    const model = new NgramModel(corpusOf("abab"), VOCAB);
    const a = 97;
    const b = 98;
    const unigram = (2 + 3 / VOCAB) / (4 + 3);
    const bigram = (2 + 1 * unigram) / (2 + 1); // after a: b twice
    const trigram = (1 + 1 * bigram) / (1 + 1); // after b a: b once
    const [p1, p2, p3] = model.probabilities(b, a, b);
    expect(p1).toBeCloseTo(unigram, 14);
    expect(p2).toBeCloseTo(bigram, 14);
    expect(p3).toBeCloseTo(trigram, 14);
    expect(model.probabilities(b, a, -1)[2]).toBeCloseTo(bigram, 14);
    expect(model.probabilities(b, 5, 6)[2]).toBeCloseTo(unigram, 14); // an unseen context
  });

  test("agrees with the formula on random texts, documents kept apart", () => {
    const text = fc.string({ unit: fc.constantFrom("a", "b", "c"), minLength: 1, maxLength: 12 });
    fc.assert(fc.property(fc.array(text, { minLength: 1, maxLength: 4 }), (texts) => {
      const train = corpusOf(...texts);
      const model = new NgramModel(train, VOCAB);
      for (const context of [[97, 98], [99, 99], [98]]) {
        for (const token of [97, 99, END, 5]) {
          const found = model.probabilities(token, context.at(-1)!, context.at(-2) ?? -1);
          for (let order = 1; order <= 3; order++) {
            expect(found[order - 1]).toBeCloseTo(wittenBell(train, context, token, order), 12);
          }
        }
      }
    }), { numRuns: 40 });
  });

  test("gives distributions that sum to one", () => {
    const model = new NgramModel(corpusOf("to be or not to be", "that is the question"), VOCAB);
    for (const [previous, before] of [[116, 32], [32, 111], [7, 7], [101, -1]]) {
      const sums = [0, 0, 0];
      for (let token = 0; token < VOCAB; token++) {
        model.probabilities(token, previous!, before!).forEach((p, order) => (sums[order]! += p));
      }
      for (const sum of sums) expect(sum).toBeCloseTo(1, 12);
    }
  });

  test("refuses tokens and vocabularies out of range", () => {
    expect(() => new NgramModel(corpusOf("a"), 200)).toThrow(UsageError);
    expect(() => new NgramModel(corpusOf("a"), 200)).toThrow(/Token 1 .* is 256, expected .* below 200/);
    const tokens = Int32Array.from({ length: 210_000 }, (_, i) => i);
    const many = { tokens, starts: Int32Array.of(0), bytes: 1, scored: 209_999, eosId: 0 };
    expect(() => new NgramModel(many, 210_000)).toThrow(/at most 208062 different tokens/);
  });

  test("tells triples apart in the largest vocabulary", () => {
    // Every token once, then triples of the last ones, whose keys are the largest.
    const V = 208_062;
    const tokens = Int32Array.from({ length: V + 6 }, (_, i) => i);
    tokens.set([V - 1, V - 1, V - 2, V - 1, V - 1, V - 3], V);
    const corpus = { tokens, starts: Int32Array.of(0), bytes: 1, scored: V + 5, eosId: 0 };
    const model = new NgramModel(corpus, 1 << 20);
    const trigram = (token: number) => model.probabilities(token, V - 1, V - 1)[2];
    expect(trigram(V - 2)).toBeGreaterThan(0.2);
    expect(trigram(V - 3)).toBeGreaterThan(0.2);
    expect(trigram(V - 4)).toBeLessThan(0.01);
    expect(trigram(V + 4)).toBeLessThan(0.01);
  });
});

describe("ngramBaselines", () => {
  test("scores uniform noise with the entropy of its alphabet", () => {
    let state = 1;
    const noise = () => Array.from({ length: 60_000 }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return "abcdefgh"[state >>> 29]!;
    }).join("");
    const scores = ngramBaselines(corpusOf(noise()), corpusOf(noise()), VOCAB);
    for (const { bitsPerByte, loss } of Object.values(scores) as { bitsPerByte: number; loss: number }[]) {
      expect(bitsPerByte).toBeGreaterThan(2.99);
      expect(bitsPerByte).toBeLessThan(3.04);
      expect(loss).toBeCloseTo(bitsPerByte * Math.LN2, 3);
    }
  });

  test("rewards context where it helps, and is quick", () => {
    const words = ["the model ", "reads a line ", "of the text ", "and writes another. "];
    let state = 7;
    const prose = Array.from({ length: 120_000 }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return words[state >>> 30]!;
    }).join("");
    const [train, validation] = [corpusOf(prose), corpusOf(prose.slice(7, 40_000))];
    const started = performance.now();
    const { unigram, bigram, trigram } = ngramBaselines(train, validation, VOCAB);
    expect(performance.now() - started).toBeLessThan(3000); // 1.5 MB
    expect(unigram.loss).toBeGreaterThan(1.5 * bigram.loss);
    expect(bigram.loss).toBeGreaterThan(1.2 * trigram.loss);
    expect(trigram.loss).toBeGreaterThan(0.1);
  });

  test("leaves a document's first token out, as training does", () => {
    const train = corpusOf("aaaa", "aaaa");
    const whole = ngramBaselines(train, corpusOf("aaaa"), VOCAB);
    const surprising = ngramBaselines(train, corpusOf("zaaa"), VOCAB);
    expect(surprising.unigram).toEqual(whole.unigram);
    expect(surprising.bigram.loss).toBeGreaterThan(whole.bigram.loss); // the second token's context is unseen
  });
});
