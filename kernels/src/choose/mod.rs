//! From logits to a token: masks and biases, the choice, log probabilities.

mod logits;

ops! {
    argmax,
    logit_bias,
    sample,
    token_mask,
    top_logprobs,
}
