import { UsageError } from "../tensor/errors.ts";
import { checkId } from "./ids.ts";
import type { DecodeOptions, DecodeStream, Tokenizer } from "./tokenizer.ts";

/** Ids of the byte tokenizer: the 256 bytes and the end of a document. */
export const BYTE_VOCABULARY = 257;
export const EOS_BYTE = 256;

/**
 * One token per UTF-8 byte, and id 256 between documents. Needs no files and loses nothing: small models can
 * be trained on any text.
 *
 * @param vocabSize of the model: ids from 257 on are padding, never produced and decoded to nothing
 * Throws UsageError for a vocabulary below 257.
 */
export function byteTokenizer(vocabSize: number = BYTE_VOCABULARY): Tokenizer {
  if (!Number.isSafeInteger(vocabSize) || vocabSize < BYTE_VOCABULARY) {
    throw new UsageError(`byte tokenizer: expected at least ${BYTE_VOCABULARY} ids, found ${vocabSize}`);
  }
  const decodeStream = (): DecodeStream => {
    // The decoder keeps incomplete sequences to itself until the next byte decides.
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push(id) {
        checkId(id, vocabSize);
        if (id < 256) return decoder.decode(Uint8Array.of(id), { stream: true });
        // A document ends: what was held back can no longer be completed.
        return decoder.decode();
      },
      finish: () => decoder.decode(),
    };
  };
  return {
    vocabSize,
    bosId: null,
    eosId: EOS_BYTE,
    stopIds: [EOS_BYTE],
    encode: (text) => Array.from(new TextEncoder().encode(text)),
    decode(ids, _options?: DecodeOptions) {
      const stream = decodeStream();
      let text = "";
      for (let i = 0; i < ids.length; i++) text += stream.push(ids[i]!);
      return text + stream.finish();
    },
    decodeStream,
    idOf(token) {
      const bytes = new TextEncoder().encode(token);
      return bytes.length === 1 ? bytes[0]! : null;
    },
  };
}
