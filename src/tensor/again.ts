/**
 * Values whose memory is given back after the forward pass, and which are made a second time when the
 * backward pass reads them.
 */
import { localsOf, Sharded, shardedOf } from "./sharded.ts";
import { Tensor } from "./tensor.ts";

/** Values for the backward pass, whose tensors stay alive until they are released. */
export interface Kept<S> {
  /** As they were kept; tensors without memory have it again, for as long as the running scope lasts. */
  values(): S;
  release(): void;
}

/** Keeps the tensors in a value, in arrays and plain objects too; not those that can be made again. */
export function keep<S>(values: S): Kept<S> {
  const tensors = tensorsIn(values).flatMap(localsOf);
  const held = tensors.filter(({ again }) => again === null);
  for (const tensor of held) tensor.retain();
  const isWhole = held.length === tensors.length;
  return {
    values: () => (isWhole ? values : madeAgain(values) as S),
    release() {
      for (const tensor of held) tensor.release();
    },
  };
}

function tensorsIn(value: unknown): Tensor[] {
  if (value instanceof Tensor) return [value];
  if (Array.isArray(value)) return value.flatMap(tensorsIn);
  return isPlain(value) ? Object.values(value).flatMap(tensorsIn) : [];
}

function madeAgain(value: unknown): unknown {
  if (value instanceof Sharded) return shardedOf(value.locals.map(localAgain));
  if (value instanceof Tensor) return localAgain(value);
  if (Array.isArray(value)) return value.map(madeAgain);
  if (!isPlain(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, madeAgain(item)]));
}

/** The same view of what was made again. */
function localAgain(view: Tensor): Tensor {
  if (!view.again) return view;
  const { byteOffset, make } = view.again;
  const made = make();
  made.device.pool.retain(made.storage);
  const same = new Tensor(
    made.device, made.storage, made.byteOffset + view.byteOffset - byteOffset, view.shape, view.dtype,
    view.key);
  same.requiresGrad = view.requiresGrad;
  same.relu2Key = view.relu2Key;
  return same;
}

function isPlain(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}
