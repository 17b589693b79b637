import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { FormatError, UsageError } from "../../src/tensor/errors.ts";
import { iterateDocuments, readDocuments, typescriptDeclarations } from "../../src/train/data.node.ts";
import { type Document, parseJsonLines, splitDocuments } from "../../src/train/data.ts";
import { MetricsWriter, readMetrics } from "../../src/train/metrics.node.ts";
import { parseMetrics } from "../../src/train/metrics.ts";
import {
  BatchPacker, IGNORED, bitsPerByte, mtpInputs, mtpLabels, tokenizeDocuments,
} from "../../src/train/packing.ts";
import { permutation } from "../../src/train/random.ts";

const END = 256;
const tokenizer = { eosId: END, encode: (text: string) => new TextEncoder().encode(text) };
const corpusOf = (...texts: string[]) => {
  return tokenizeDocuments(texts.map((text) => ({ name: text, text })), tokenizer);
};

let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), "krait-data-"))));
afterEach(() => rmSync(folder, { recursive: true }));

function put(path: string, content: string | Uint8Array): string {
  const full = join(folder, path);
  mkdirSync(join(full, ".."), { recursive: true });
  writeFileSync(full, content);
  return full;
}

describe("reading documents", () => {
  test("walks a folder in sorted order and passes over what is not text", () => {
    put("c/b.txt", "bee");
    put("c/a/z.md", "zed");
    put("c/a-z.txt", "dash");
    put("c/B.txt", "big");
    put("c/empty.txt", "");
    put("c/picture.png", Uint8Array.of(137, 80, 78, 71, 0, 0));
    put("c/latin1.txt", Uint8Array.of(99, 97, 102, 233));
    put("c/.hidden/x.txt", "no");
    put("c/node_modules/x.txt", "no");
    put("c/lines.jsonl", `{"text":"one"}\n\n{"text":"two","id":7}\n{"text":""}\r\n`);
    put("outside.txt", "outside");
    symlinkSync(join(folder, "outside.txt"), join(folder, "c/link.txt"));
    symlinkSync(folder, join(folder, "c/loop"));
    expect(readDocuments([join(folder, "c")])).toEqual([
      { name: "c/B.txt", text: "big" },
      { name: "c/a-z.txt", text: "dash" },
      { name: "c/a/z.md", text: "zed" },
      { name: "c/b.txt", text: "bee" },
      { name: "c/lines.jsonl:1", text: "one" },
      { name: "c/lines.jsonl:3", text: "two" },
    ]);
  });

  test("takes a byte order mark off, and files in the order given", () => {
    const [a, b] = [put("a.txt", "\ufeffsecond"), put("b.txt", "first")];
    expect(readDocuments([b, a]).map((d) => d.text)).toEqual(["first", "second"]);
  });

  test.each([
    ["missing", UsageError, /missing does not exist/],
    ["binary.bin", FormatError, /binary\.bin is not UTF-8 text/],
    ["empty.txt", FormatError, /empty\.txt holds no text/],
    ["bare", FormatError, /bare holds no text files/],
  ])("refuses %s", (name, kind, message) => {
    put("binary.bin", Uint8Array.of(1, 0, 2));
    put("empty.txt", "");
    put("bare/nothing.bin", Uint8Array.of(0));
    const read = () => [...iterateDocuments([join(folder, name)])];
    expect(read).toThrow(kind);
    expect(read).toThrow(message);
  });

  test("refuses no paths at all", () => expect(() => readDocuments([])).toThrow(UsageError));

  test.each([
    ['{"text":"ok"}\n{"text":', /x\.jsonl line 2: expected a JSON object, found/],
    ['\n\n["text"]', /x\.jsonl line 3: expected an object with a string "text", found "\[/],
    ['{"body":"a","id":1}', /line 1: .*found the fields body, id/],
    ['{"text":5}', /line 1: .*"text" that is not a string/],
    ["null", /line 1: .*found "null"/],
  ])("names the malformed line of %j", (content, message) => {
    expect(() => [...parseJsonLines(content, "x.jsonl")]).toThrow(FormatError);
    expect(() => [...parseJsonLines(content, "x.jsonl")]).toThrow(message);
  });
});

describe("typescriptDeclarations", () => {
  test("takes each declaration once, sorted by path", () => {
    put("m/b/index.d.ts", "b\n");
    put("m/b/index.d.mts", "b again\n");
    put("m/b/copy.d.cts", "a\n");
    put("m/@s/a/x.d.mts", "a\n");
    put("m/b/index.ts", "source\n");
    put("m/.cache/c.d.ts", "cache\n");
    put("m/b/node_modules/d/d.d.cts", "d\n");
    expect(typescriptDeclarations(join(folder, "m"))).toEqual([
      { name: "@s/a/x.d.mts", text: "a\n" },
      { name: "b/index.d.mts", text: "b again\n" },
      { name: "b/node_modules/d/d.d.cts", text: "d\n" },
    ]);
  });

  test("shares the bytes among the packages and cuts at a line's end", () => {
    put("m/big/a.d.ts", "0123456789\n".repeat(3));
    put("m/big/b.d.ts", "abcdefghij\n".repeat(100));
    put("m/big/c.d.ts", "short\n");
    put("m/small/a.d.ts", "tiny\n");
    put("m/wide/a.d.ts", "é\n".repeat(200));
    const documents = typescriptDeclarations(join(folder, "m"), { maxBytes: 105 });
    expect(documents).toEqual([
      { name: "big/a.d.ts", text: "0123456789\n".repeat(3) },
      { name: "big/b.d.ts", text: "abcdefghij\n" },
      { name: "small/a.d.ts", text: "tiny\n" },
      { name: "wide/a.d.ts", text: "é\n".repeat(16) },
    ]);
  });

  test("refuses a folder without any", () => {
    put("m/a/index.js", "");
    expect(() => typescriptDeclarations(join(folder, "m"))).toThrow(/no TypeScript declarations/);
    expect(() => typescriptDeclarations(join(folder, "n"))).toThrow(/does not exist/);
  });
});

describe("splitDocuments", () => {
  const equal = Array.from({ length: 400 }, (_, i) => ({ name: `d/${i}`, text: `${i}`.padStart(100, ".") }));
  const names = (documents: readonly Document[]) => documents.map((d) => d.name);

  test("keeps every document once, in order, with 7.5 to 10 % for validation", () => {
    const { train, validation } = splitDocuments(equal, { seed: 3 });
    expect(validation.length).toBeGreaterThanOrEqual(30);
    expect(validation.length).toBeLessThanOrEqual(40);
    const place = new Map(equal.map((d, i) => [d, i]));
    for (const side of [train, validation]) {
      const places = side.map((d) => place.get(d)!);
      expect(places).toEqual(places.toSorted((a, b) => a - b));
    }
    expect(new Set([...train, ...validation])).toEqual(new Set(equal));
    expect(train.length + validation.length).toBe(400);
  });

  test("depends on the seed and on nothing else", () => {
    expect(splitDocuments(equal, { seed: 3 })).toEqual(splitDocuments(equal, { seed: 3 }));
    expect(names(splitDocuments(equal, { seed: 4 }).validation))
      .not.toEqual(names(splitDocuments(equal, { seed: 3 }).validation));
    const reversed = splitDocuments(equal.toReversed(), { seed: 3 }).validation;
    expect(names(reversed).toReversed()).toEqual(names(splitDocuments(equal, { seed: 3 }).validation));
  });

  test("never validates on a text that was trained on", () => {
    const twins = equal.flatMap((d) => [d, { name: `copy/${d.name}`, text: d.text }]);
    const { train, validation } = splitDocuments(twins);
    const trained = new Set(train.map((d) => d.text));
    expect(validation.length % 2).toBe(0);
    expect(validation.some((d) => trained.has(d.text))).toBe(false);
  });

  test("gives both sides something, the small part to validation when sizes are unequal", () => {
    const large = { name: "large", text: "x".repeat(1000) };
    const small = { name: "small", text: "y".repeat(300) };
    for (let seed = 0; seed < 8; seed++) {
      expect(splitDocuments([large, small], { seed })).toEqual({ train: [large], validation: [small] });
    }
  });

  test("cuts a lone document near its last tenth", () => {
    const text = Array.from({ length: 100 }, (_, i) => `line ${String(i).padStart(4, "0")}\n`).join("");
    const { train, validation } = splitDocuments([{ name: "a", text }, { name: "empty", text: "" }]);
    expect(train[0]!.text + validation[0]!.text).toBe(text);
    expect(validation[0]!.text.startsWith("line 0090\n")).toBe(true);
    const emoji = splitDocuments([{ name: "b", text: "😀".repeat(21) }]);
    expect(emoji.validation[0]!.text).toBe("😀".repeat(3));
  });

  test("refuses too little text and a wrong fraction", () => {
    expect(() => splitDocuments([])).toThrow(FormatError);
    expect(() => splitDocuments([{ name: "a.txt", text: "x" }])).toThrow(/a\.txt holds 1 characters/);
    expect(() => splitDocuments(equal, { fraction: 0.6 })).toThrow(/found 0.6/);
  });
});

describe("tokenizeDocuments", () => {
  test("ends every document and counts what bits per byte needs", () => {
    const corpus = corpusOf("ab", "", "é");
    expect([...corpus.tokens]).toEqual([97, 98, END, 195, 169, END]);
    expect([...corpus.starts]).toEqual([0, 3]);
    expect(corpus).toMatchObject({ bytes: 4, scored: 4 });
    expect(bitsPerByte(Math.LN2 * 3, corpus)).toBeCloseTo(3, 12);
  });

  test("counts bytes as UTF-8 does", () => {
    fc.assert(fc.property(fc.string({ unit: "grapheme", minLength: 1 }), (text) => {
      expect(corpusOf(text).bytes).toBe(new TextEncoder().encode(text).length);
    }));
    const edges = ["\x7f", "\x80", "\u07ff", "\u0800", "\uffff", "😀"];
    expect(edges.map((text) => corpusOf(text).bytes)).toEqual([1, 2, 2, 3, 3, 4]);
  });

  test("refuses documents without tokens", () => expect(() => corpusOf("", "")).toThrow(FormatError));
});

describe("BatchPacker", () => {
  const rowsOf = (values: Int32Array, width: number) => {
    const starts = Array.from({ length: values.length / width }, (_, row) => row * width);
    return starts.map((from) => [...values.subarray(from, from + width)]);
  };

  test("cuts documents into rows with shifted labels and document numbers", () => {
    const packer = new BatchPacker(corpusOf("abcd", "e", "fg"), { batch: 2, seqlen: 5 });
    const [first, ...others] = [...packer.sequential()];
    const [a, b, c, d, e, f, g] = [97, 98, 99, 100, 101, 102, 103];
    expect(others).toEqual([]);
    expect(rowsOf(first!.ids, 6)).toEqual([[a, b, c, d, END, e], [e, END, f, g, END, END]]);
    expect(rowsOf(first!.input_ids, 5)).toEqual([[a, b, c, d, END], [e, END, f, g, END]]);
    expect(rowsOf(first!.labels, 5)).toEqual([[b, c, d, END, IGNORED], [END, IGNORED, g, END, IGNORED]]);
    expect(rowsOf(first!.seq_idx, 5)).toEqual([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]);
    expect(first!.scored).toBe(7);
  });

  test("scores every token but a document's first exactly once per epoch, whatever the sizes", () => {
    const texts = fc.array(fc.string({ minLength: 1, maxLength: 20 }), { minLength: 1, maxLength: 8 });
    const upTo = (max: number) => fc.integer({ min: 1, max });
    const sizes = fc.record({ batch: upTo(5), seqlen: upTo(30) });
    fc.assert(fc.property(texts, sizes, fc.nat(), (documents, { batch, seqlen }, seed) => {
      const corpus = corpusOf(...documents);
      const packer = new BatchPacker(corpus, { batch, seqlen, seed });
      const expected = [...corpus.tokens].filter((_, i) => !corpus.starts.includes(i)).sort((p, q) => p - q);
      const scored: number[] = [];
      for (const item of packer.sequential()) {
        const labels = [...item.labels].filter((label) => label !== IGNORED);
        expect(labels).toHaveLength(item.scored);
        scored.push(...labels);
        for (let i = 0; i < item.labels.length; i++) {
          const [row, t] = [Math.floor(i / seqlen), i % seqlen];
          const next = item.ids[row * (seqlen + 1) + t + 1]!;
          expect(item.input_ids[i]).toBe(item.ids[row * (seqlen + 1) + t]);
          if (item.labels[i] !== IGNORED) {
            expect(item.labels[i]).toBe(next);
            if (t + 1 < seqlen) expect(item.seq_idx[i + 1]).toBe(item.seq_idx[i]);
          } else if (t + 1 < seqlen && item.seq_idx[i + 1] === item.seq_idx[i]) {
            expect(next).toBe(END); // padding
          }
        }
      }
      expect(scored.sort((p, q) => p - q)).toEqual(expected);

      // Training over `batch` epochs is a whole number of batches and scores everything `batch` times.
      let total = 0;
      for (let i = 0; i < packer.rows; i++) total += packer.next().scored;
      expect(total).toBe(batch * corpus.scored);
      expect(packer.state).toEqual({ epoch: batch, cursor: 0 });
    }), { numRuns: 60 });
  });

  test("changes documents where tokens do", () => {
    const [item] = [...new BatchPacker(corpusOf("a", "b", "c"), { batch: 1, seqlen: 8 }).sequential()];
    expect([...item!.seq_idx]).toEqual([0, 0, 1, 1, 2, 2, 3, 3]);
    expect([...item!.labels]).toEqual([END, IGNORED, END, IGNORED, END, IGNORED, IGNORED, IGNORED]);
  });

  const corpus = corpusOf(Array.from({ length: 500 }, (_, i) => String(i)).join(" "));
  const options = { batch: 3, seqlen: 16, seed: 11 };

  test("shuffles the rows anew in every epoch", () => {
    const packer = new BatchPacker(corpus, { ...options, batch: 1 });
    const epoch = () => Array.from({ length: packer.rows }, () => packer.next().ids.join());
    const [first, second] = [epoch(), epoch()];
    expect(first).not.toEqual(second);
    expect(first.toSorted()).toEqual(second.toSorted());
    expect(new Set(first).size).toBe(packer.rows);
  });

  test("continues exactly from a saved state, and from a step's number", () => {
    const whole = new BatchPacker(corpus, options);
    const batches = Array.from({ length: 120 }, () => whole.next());
    for (const at of [119, 0, 1, 40, 41, 42]) {
      whole.seek(at); // from a later epoch back to an earlier one, too
      expect(whole.next()).toEqual(batches[at]);
      const first = new BatchPacker(corpus, options);
      for (let i = 0; i < at; i++) first.next();
      const resumed = new BatchPacker(corpus, options);
      resumed.next();
      resumed.restore(JSON.parse(JSON.stringify(first.state)) as typeof first.state);
      expect(resumed.next()).toEqual(batches[at]);
      resumed.seek(at);
      expect(resumed.state).toEqual(first.state);
      expect(resumed.next()).toEqual(batches[at]);
    }
  });

  test("has a fingerprint that tells other data, sizes and seeds apart", () => {
    const prints = [
      new BatchPacker(corpus, options),
      new BatchPacker(corpus, { ...options, seed: 12 }),
      new BatchPacker(corpus, { ...options, seqlen: 17 }),
      new BatchPacker(corpus, { ...options, batch: 4 }),
      new BatchPacker(corpusOf("abc", "d"), options),
      new BatchPacker(corpusOf("ab", "cd"), options),
    ].map((packer) => packer.fingerprint);
    expect(new Set(prints).size).toBe(6);
    expect(new BatchPacker(corpus, options).fingerprint).toBe(prints[0]);
    expect(prints[0]).toMatch(/^[0-9a-f]{8}$/);
  });

  test("spreads an evaluation of some rows evenly over the corpus", () => {
    const packer = new BatchPacker(corpus, { ...options, batch: 2 });
    const before = packer.state;
    const some = [...packer.sequential(3)].flatMap((item) => rowsOf(item.ids, 17));
    const all = [...packer.sequential()].flatMap((item) => rowsOf(item.ids, 17));
    const third = packer.rows / 3;
    expect(some).toEqual([all[0], all[Math.floor(third)], all[Math.floor(2 * third)], Array(17).fill(END)]);
    expect(packer.state).toEqual(before);
  });

  test.each([
    [{ batch: 0, seqlen: 4 }, UsageError, /batch .* found 0/],
    [{ batch: 1, seqlen: 1.5 }, UsageError, /seqlen .* found 1.5/],
    [{ batch: 1, seqlen: 4, seed: -1 }, UsageError, /seed .* found -1/],
  ])("refuses %j", (wrong, kind, message) => {
    expect(() => new BatchPacker(corpus, wrong)).toThrow(kind);
    expect(() => new BatchPacker(corpus, wrong)).toThrow(message);
  });

  test("refuses a position outside the corpus", () => {
    const packer = new BatchPacker(corpus, options);
    expect(() => packer.restore({ epoch: 0, cursor: packer.rows })).toThrow(FormatError);
    expect(() => packer.restore({ epoch: -1, cursor: 0 })).toThrow(/epoch -1, row 0/);
  });
});

test("multi-token prediction looks further ahead, and scores within one document", () => {
  const [batch] = [...new BatchPacker(corpusOf("abc", "de"), { batch: 2, seqlen: 3 }).sequential()];
  const [a, b, c, d, e] = [97, 98, 99, 100, 101];
  expect([...batch!.input_ids]).toEqual([a, b, c, END, d, e]);
  expect([...batch!.labels]).toEqual([b, c, END, IGNORED, e, END]);
  expect([...mtpInputs(batch!, 1)]).toEqual([b, c, END, d, e, END]);
  expect([...mtpLabels(batch!, 1)]).toEqual([c, END, IGNORED, IGNORED, END, IGNORED]);
  expect([...mtpInputs(batch!, 2)]).toEqual([c, END, 0, e, END, 0]);
  expect([...mtpLabels(batch!, 2)]).toEqual([END, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]);
  expect(() => mtpLabels(batch!, 3)).toThrow(/from 1 to 2, found 3/);
});

describe("permutation", () => {
  test("is a permutation, different for every seed and step", () => {
    const keys = [[0, 0], [0, 1], [1, 0], [2 ** 32, 0]] as const;
    const orders = keys.map(([seed, step]) => permutation(50, seed, step));
    for (const order of orders) expect([...order].sort((a, b) => a - b)).toEqual([...Array(50).keys()]);
    expect(new Set(orders.map((order) => order.join())).size).toBe(4);
  });

  test("favours no place", () => {
    const landed = [0, 0, 0, 0];
    for (let step = 0; step < 4000; step++) landed[permutation(4, 9, step).indexOf(0)]!++;
    // 1000 expected each, standard deviation 27.
    for (const count of landed) expect(Math.abs(count - 1000)).toBeLessThan(140);
  });
});

describe("metrics.jsonl", () => {
  const path = () => join(folder, "run/metrics.jsonl");

  test("keeps every record, values that are not finite too", () => {
    const records = [
      { step: 0, val_loss: 5.5 },
      { step: 1, loss: NaN, grad_norm: Infinity, lr: 1e-7, mtp_loss: [1.5, NaN], note: "a\nb" },
      { step: 2, loss: -Infinity, stopped: null },
    ];
    const writer = new MetricsWriter(path());
    for (const record of records) writer.write(record);
    expect(readMetrics(path())).toEqual(records); // before closing: a crash loses nothing
    writer.close();
    writer.close();
    expect(readMetrics(path())).toEqual(records);
  });

  test("takes out what lies beyond the resumed step, and a half-written line", () => {
    const first = new MetricsWriter(path());
    for (let step = 1; step <= 5; step++) first.write({ step, loss: step });
    first.close();
    writeFileSync(path(), '{"step":6,"lo', { flag: "a" });
    const second = new MetricsWriter(path(), 3);
    expect(readMetrics(path()).map((r) => r.step)).toEqual([1, 2, 3]);
    expect(() => second.write({ step: 2 })).toThrow(UsageError);
    second.write({ step: 4, loss: 40 });
    second.close();
    expect(readMetrics(path()).map((r) => r.loss)).toEqual([1, 2, 3, 40]);
    new MetricsWriter(path()).close();
    expect(readMetrics(path())).toEqual([]);
  });

  test("names the line that is damaged", () => {
    const parse = (content: string) => () => parseMetrics(content, "m");
    expect(parse('{"step":1}\n{"step"\n{"step":3}\n')).toThrow(/^m line 2: expected a JSON object/);
    expect(parse('{"loss":1}\n')).toThrow(/^m line 1: expected an object with a whole "step"/);
    expect(() => readMetrics(path())).toThrow(/does not exist/);
  });
});
