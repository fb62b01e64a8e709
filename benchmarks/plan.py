def flops(config, segments):
    """Floating-point operations of one forward and backward of pairs, counted in distinct tokens."""
    text = config.get_text_config()
    d, V, layers = text.hidden_size, text.vocab_size, text.num_hidden_layers
    heads = text.num_attention_heads
    hd = getattr(text, "head_dim", None) or d // heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    n = layers * (d * hd * (2 * heads + 2 * kv) + 3 * d * text.intermediate_size)
    total = 0
    for p, c, r in segments:
        total += 6 * n * (p + c + r) + 6 * d * V * (c + r)
        total += 12 * layers * heads * hd * ((p + c) ** 2 / 2 + r * p + r * r / 2)
    return total
