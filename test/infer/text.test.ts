import { expect, test } from "vitest";
import type { GenerateOptions, Generator } from "../../src/infer/engine.ts";
import { generateText } from "../../src/infer/text.ts";
import { byteTokenizer, EOS_BYTE } from "../../src/text/byte_tokenizer.ts";

/** Stands in for a model: says what it is told. */
function speaker(bytes: readonly number[]): Generator {
  return {
    async *generate(_: readonly number[], { maxTokens }: GenerateOptions) {
      yield* bytes.slice(0, maxTokens);
    },
  } as unknown as Generator;
}

async function say(bytes: readonly number[], stopStrings: string[] = [], maxTokens = 100) {
  const run = generateText(speaker(bytes), byteTokenizer(260), [65], { maxTokens, stopStrings });
  const pieces: string[] = [];
  for await (const piece of run.pieces) pieces.push(piece);
  return { text: pieces.join(""), pieces, stopped: run.stopped, tokens: run.tokens.length };
}

const bytes = (text: string) => [...new TextEncoder().encode(text)];

test("stops before a stop string, also one that comes in pieces", async () => {
  expect(await say(bytes("one END two"), ["END"])).toMatchObject({ text: "one ", stopped: "END" });
  expect(await say(bytes("EN EN END"), ["END"])).toMatchObject({ text: "EN EN ", stopped: "END" });
  expect(await say(bytes("no such thing"), ["END"]))
    .toMatchObject({ text: "no such thing", stopped: "length" });
  expect(await say(bytes("ab"), ["b", "ab"])).toMatchObject({ text: "", stopped: "ab" });
});

test("ends at the end token and at the limit", async () => {
  expect(await say([...bytes("done"), EOS_BYTE, 65]))
    .toMatchObject({ text: "done", stopped: "token", tokens: 5 });
  expect(await say(bytes("abcdef"), [], 3)).toMatchObject({ text: "abc", stopped: "length" });
});

test("never yields half of a character", async () => {
  const { pieces, text } = await say(bytes("a€😀"));
  expect(text).toBe("a€😀");
  expect(pieces).toEqual(["a", "€", "😀"]);
});
