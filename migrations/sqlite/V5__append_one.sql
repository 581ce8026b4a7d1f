-- MySQL has a procedure of this number. A file's statements are prepared once, and there is nobody to answer.
SELECT 1;
