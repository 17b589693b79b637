// Plans of which some choices or slots stay without a partner.

// In token_slot: the choice was dropped.
const NO_SLOT: u32 = 0xffffffff;
// In topk_idx: the choice was dropped.
const NO_CHOICE: u32 = 0xffffffff;
// In slot_token: the slot is there for its place alone.
const NO_TOKEN: u32 = 0xffffffff;
