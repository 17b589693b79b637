/**
 * Values for the backward pass. The memory of some is given back after the forward pass: they are made a
 * second time, or come back from host memory (`offload.ts`), when the backward pass reads them.
 */
import { Holder } from "./offload.ts";
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
  const holder = new Holder(tensors.filter(({ again }) => again === null));
  return {
    values: () => (holder.here.length === tensors.length ? values : madeAgain(values, holder) as S),
    release: () => holder.release(),
  };
}

function tensorsIn(value: unknown): Tensor[] {
  if (value instanceof Tensor) return [value];
  if (Array.isArray(value)) return value.flatMap(tensorsIn);
  return isPlain(value) ? Object.values(value).flatMap(tensorsIn) : [];
}

function madeAgain(value: unknown, holder: Holder): unknown {
  const inside = (item: unknown) => madeAgain(item, holder);
  if (value instanceof Sharded) return shardedOf(value.locals.map((local) => localAgain(local, holder)));
  if (value instanceof Tensor) return localAgain(value, holder);
  if (Array.isArray(value)) return value.map(inside);
  if (!isPlain(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, inside(item)]));
}

function localAgain(view: Tensor, { away }: Holder): Tensor {
  const stowed = away.get(view);
  if (stowed) return viewOf(stowed.get(), 0, view);
  if (!view.again) return view;
  const { byteOffset, make } = view.again;
  return viewOf(make(), view.byteOffset - byteOffset, view);
}

/** The same view of what is there again. */
function viewOf(made: Tensor, offset: number, view: Tensor): Tensor {
  made.device.pool.retain(made.storage);
  const same = new Tensor(
    made.device, made.storage, made.byteOffset + offset, view.shape, view.dtype, view.key);
  same.requiresGrad = view.requiresGrad;
  same.relu2Key = view.relu2Key;
  return same;
}

function isPlain(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}
