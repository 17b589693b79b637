import { readFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { FormatError, UsageError } from "../../src/tensor/errors.ts";
import { byteTokenizer } from "../../src/text/byte_tokenizer.ts";
import { hubTokenizer } from "../../src/text/tokenizer.ts";
import type { Tokenizer } from "../../src/text/tokenizer.ts";

const read = (name: string) => readFileSync(new URL(`../fixtures/${name}`, import.meta.url), "utf8");

interface Case {
  text: string;
  ids: number[];
  decoded: string;
  plain?: string;
}
// Encoded and decoded by the Rust library that defines the format, with the very same files.
interface Expected {
  vocabSize: number;
  cases: Case[];
  metaspace: Case[];
}
const expected = JSON.parse(read("tokenizer_cases.json")) as Expected;
const bpeJson = read("tokenizer.json");
const bpe = hubTokenizer(bpeJson);
const metaspace = hubTokenizer(read("tokenizer_metaspace.json"));

const TEXTS = ["plain", "naïve café", "日本語 🎉", "👩\u200d👧", "\ufeffbom", "a\u0000b", ""];

/** Streams token by token and checks that every piece is whole characters. */
function streamed(tokenizer: Tokenizer, ids: readonly number[]): string {
  const stream = tokenizer.decodeStream();
  const pieces = [...ids.map((id) => stream.push(id)), stream.finish()];
  // encodeURIComponent refuses half of a surrogate pair.
  for (const piece of pieces) expect(() => encodeURIComponent(piece)).not.toThrow();
  return pieces.join("");
}

describe("byte tokenizer", () => {
  const bytes = byteTokenizer();

  test("ids are UTF-8 bytes; 256 ends a document", () => {
    expect([bytes.vocabSize, bytes.bosId, bytes.eosId, bytes.stopIds]).toEqual([257, null, 256, [256]]);
    expect(bytes.encode("aé")).toEqual([97, 0xc3, 0xa9]);
    expect(bytes.decode([97, 256, 98])).toBe("ab");
    expect([bytes.idOf("\n"), bytes.idOf("ab")]).toEqual([10, null]);
  });

  test("any text comes back, at once and as a stream", () => {
    fc.assert(fc.property(fc.string({ unit: "binary", maxLength: 40 }), (text) => {
      expect(bytes.decode(bytes.encode(text))).toBe(text);
      expect(streamed(bytes, bytes.encode(text))).toBe(text);
    }));
    for (const text of TEXTS) expect(streamed(bytes, bytes.encode(text))).toBe(text);
  });

  test("a stream holds back incomplete characters and gives up at the end of a document", () => {
    const stream = bytes.decodeStream();
    const [a, b, c, d] = new TextEncoder().encode("🎉") as unknown as [number, number, number, number];
    expect([stream.push(a), stream.push(b), stream.push(c), stream.push(d)]).toEqual(["", "", "", "🎉"]);
    expect([stream.push(a), stream.push(256), stream.push(97)]).toEqual(["", "\ufffd", "a"]);
    expect([stream.push(a), stream.push(b), stream.finish()]).toEqual(["", "", "\ufffd"]);
    expect(stream.push(0x80)).toBe("\ufffd");
  });

  test("a padded vocabulary has ids that mean nothing; others are refused", () => {
    const padded = byteTokenizer(260);
    expect(padded.vocabSize).toBe(260);
    expect(padded.decode([97, 259, 98])).toBe("ab");
    expect(() => padded.decode([260])).toThrow("token id: expected an integer from 0 to 259, found 260");
    expect(() => bytes.decode([1.5])).toThrow(UsageError);
    expect(() => bytes.decodeStream().push(-1)).toThrow(UsageError);
    expect(() => byteTokenizer(256)).toThrow("byte tokenizer: expected at least 257 ids, found 256");
  });
});

describe("tokenizer.json, byte-level BPE with the split pattern of this family", () => {
  test("ids of the control tokens", () => {
    expect(bpe.vocabSize).toBe(expected.vocabSize);
    expect([bpe.bosId, bpe.eosId, bpe.stopIds]).toEqual([1, 2, [2, 4]]);
    expect(["</think>", "<|im_start|>", "nothing of the kind"].map(bpe.idOf)).toEqual([701, 3, null]);
  });

  test.each(expected.cases)("$text", ({ text, ids, decoded, plain }) => {
    expect(bpe.encode(text)).toEqual(ids);
    expect(bpe.decode(ids)).toBe(decoded);
    expect(bpe.decode(ids, { skipSpecial: true })).toBe(plain);
    expect(streamed(bpe, ids)).toBe(decoded);
  });

  test("any text comes back", () => {
    fc.assert(fc.property(fc.string({ unit: "binary", maxLength: 30 }), (text) => {
      expect(streamed(bpe, bpe.encode(text))).toBe(text);
    }));
  });

  test("skipping special tokens keeps ordinary added ones", () => {
    const ids = bpe.encode("<|im_start|>a<think>b</think><|im_end|>");
    expect(ids.filter((id) => id < 5 || id > 699)).toEqual([3, 700, 701, 4]);
    expect(bpe.decode(ids, { skipSpecial: true })).toBe("a<think>b</think>");
  });

  test("ids that are none are refused; gaps decode to nothing", () => {
    expect(() => bpe.decode([702])).toThrow("token id: expected an integer from 0 to 701, found 702");
    const file = JSON.parse(bpeJson) as { added_tokens: { id: number; content: string }[] };
    file.added_tokens.push({ id: 710, content: "<far>" });
    const sparse = hubTokenizer(JSON.stringify(file));
    expect(sparse.vocabSize).toBe(711);
    expect(sparse.decode([705, ...sparse.encode("x"), 710])).toBe("x<far>");
  });

  test("long input takes time in proportion", () => {
    const seconds = (text: string) => {
      const start = performance.now();
      bpe.encode(text);
      return (performance.now() - start) / 1000;
    };
    for (const unit of ["a", " ", "é", "-", "a ", "1", "\n"]) {
      expect(bpe.decode(bpe.encode(unit.repeat(5000)))).toBe(unit.repeat(5000));
      // A few tenths of a second in practice; an algorithm that is quadratic needs minutes.
      expect(seconds(unit.repeat(50_000))).toBeLessThan(10);
    }
  });
});

describe("tokenizer.json, words marked by a meta space, unknown characters as bytes", () => {
  test.each(expected.metaspace)("$text", ({ text, ids, decoded }) => {
    expect(metaspace.encode(text)).toEqual(ids);
    expect(metaspace.decode(ids)).toBe(decoded);
    expect(streamed(metaspace, ids)).toBe(decoded);
  });

  test("a stream holds back incomplete bytes, and gives them up at the end", () => {
    const byte = (value: number) => metaspace.idOf(`<0x${value.toString(16).toUpperCase()}>`)!;
    const stream = metaspace.decodeStream();
    const pieces = [...new TextEncoder().encode("日")].map((value) => stream.push(byte(value)));
    expect(pieces).toEqual(["", "", "日"]);
    expect([stream.push(byte(0xe6)), stream.finish()]).toEqual(["", "\ufffd"]);
    expect(metaspace.decode([])).toBe("");
    expect(() => metaspace.decode([9999])).toThrow(UsageError);
  });
});

describe("damaged and hostile files", () => {
  const edit = (change: (file: Record<string, unknown>) => void) => {
    const file = JSON.parse(bpeJson) as Record<string, unknown>;
    change(file);
    return JSON.stringify(file);
  };
  test.each<[string, string, RegExp]>([
    ["no JSON", "{", /^tokenizer\.json: line 1, column 2/],
    ["a list", "[]", /expected an object/],
    ["a key twice", '{"model": {}, "model": {}}', /"model" a second time/],
    ["no model", edit((file) => delete file["model"]), /expected model\.vocab, found none/],
    ["no vocabulary", edit((file) => (file["model"] = { type: "BPE" })), /expected model\.vocab/],
    ["an id that is text", edit((file) => (file["model"] = { type: "BPE", vocab: { a: "0" }, merges: [] })),
      /token "a": expected an id below 2\^24, found "0"/],
    ["an id out of range", edit((file) => (file["model"] = { type: "BPE", vocab: { a: 2 ** 24 } })),
      /found 16777216/],
    ["an unknown model", edit((file) => (file["model"] = { type: "Magic", vocab: { a: 0 } })),
      /of type BPE or Unigram or WordPiece, found "Magic"/],
    ["an added token without a text", edit((file) => (file["added_tokens"] = [{ id: 3 }])), /content and id/],
    ["added tokens that are no list", edit((file) => (file["added_tokens"] = {})), /a list added_tokens/],
    ["nothing in it", edit((file) => {
      file["added_tokens"] = [];
      file["model"] = { type: "BPE", vocab: {}, merges: [] };
    }), /expected at least one token/],
    ["no end token", edit((file) => (file["added_tokens"] = [])), /expected an end token/],
    ["a pattern of 5,000 characters", edit((file) => {
      file["pre_tokenizer"] = { type: "Split", pattern: { Regex: "a".repeat(5000) }, behavior: "Isolated" };
    }), /pre_tokenizer: expected a pattern of at most 4096 characters, found 5000/],
    ["a pattern that is none", edit((file) => {
      file["pre_tokenizer"] = { type: "Split", pattern: { Regex: "(" }, behavior: "Isolated" };
    }), /expected a usable tokenizer, found/],
  ])("%s", (name, json, message) => {
    // The vocabulary still has </s> when the added tokens are gone, unless the model's own table lacks it.
    const settings = name === "no end token" ? '{"eos_token": "<gone>"}' : undefined;
    expect(() => hubTokenizer(json, settings)).toThrow(FormatError);
    expect(() => hubTokenizer(json, settings)).toThrow(message);
  });

  test("the settings file names the end token, as text or as an object", () => {
    const text = hubTokenizer(bpeJson, '{"eos_token": "<|im_end|>"}');
    expect(text).toMatchObject({ eosId: 4, stopIds: [4] });
    const object = hubTokenizer(bpeJson, '{"eos_token": {"content": "<unk>"}}');
    expect(object).toMatchObject({ eosId: 0, stopIds: [0, 4] });
    expect(() => hubTokenizer(bpeJson, "[]")).toThrow("tokenizer_config.json: expected an object");
  });
});
